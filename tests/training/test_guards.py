"""What counts as a spike, what is done about it, when a checkpoint is due, and whom a hang is blamed on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmflow.core.errors import TrainingError
from mmflow.training import metrics
from mmflow.training.config import GuardsConfig
from mmflow.training.guards import Beat, Guards, Rewind, Trouble, laggards, spike_limit
from mmflow.training.loop import Due
from mmflow.training.metrics import free_memory_share


def falling(num_steps: int, seed: int = 0) -> list[float]:
    """A loss that falls from 4 to 2 with noise of 0.05."""
    noise = np.random.default_rng(seed).normal(0, 0.05, num_steps)
    return list(np.linspace(4, 2, num_steps) + noise)


def guards(**changes: Any) -> Guards:
    return Guards(GuardsConfig(spike_window=20, **changes))


def by_step(losses: list[float], first: int = 1) -> dict[int, float]:
    return dict(enumerate(losses, first))


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_falls_has_no_spikes(seed: int) -> None:
    assert guards().look(by_step(falling(500, seed))) is None


def test_a_spike_is_found_and_does_not_hide_the_next() -> None:
    found = guards()
    losses = by_step(falling(100))
    losses[60], losses[61], losses[70] = 9.0, 12.0, 9.5
    trouble = found.look(losses)
    assert trouble is not None
    assert (trouble.kind, trouble.steps) == ("spike", (60, 61, 70))
    assert "9, far above" in trouble.what


def test_nothing_is_a_spike_before_half_of_the_window_is_known() -> None:
    assert guards().look(by_step([*[1.0] * 9, 50.0])) is None
    assert guards().look(by_step([*[1.0] * 10, 50.0])) is not None


def test_a_loss_that_hardly_moves_may_move_a_little() -> None:
    assert spike_limit([2.0] * 50, 8) == pytest.approx(2.0 * 1.08)
    assert spike_limit([], 8) == math.inf
    # median 3, absolute deviations 2 1 0 1 2, of which the median is 1
    assert spike_limit([1.0, 2.0, 3.0, 4.0, 5.0], 2) == pytest.approx(3 + 2 * 1.4826)


def test_a_loss_that_is_no_number_is_trouble_whatever_the_window() -> None:
    trouble = guards(on_spike="ignore").look({5: 1.0, 6: math.nan, 7: math.inf})
    assert trouble == Trouble("nonfinite", (6, 7), "the loss is nan")


def test_policies() -> None:
    nonfinite, spike = Trouble("nonfinite", (6, 8), "the loss is nan"), Trouble("spike", (9, 10), "high")
    with pytest.raises(TrainingError, match=r"^step 6: the loss is nan; do this$"):
        guards().act(nonfinite, "do this")
    guards(on_nonfinite="skip").act(nonfinite, "")
    guards().act(spike, "")  # is recorded
    with pytest.raises(Rewind):
        guards(on_spike="rewind").act(spike, "")


def test_rewinds_are_bounded_and_known_to_a_restart() -> None:
    found = guards(on_spike="rewind", on_nonfinite="rewind", max_rewinds=2)
    found.rewound(Trouble("spike", (9, 10), "high"))
    assert found.passed_over == {8, 9, 10}
    assert not found.watches(5)
    found.rewound(Trouble("nonfinite", (20, 22), "the loss is nan"))
    assert found.watches(22)
    assert not found.watches(23)
    with pytest.raises(TrainingError, match="after 2 rewinds"):
        found.act(Trouble("spike", (30,), "high"), "")
    restarted = guards(on_spike="rewind", max_rewinds=2)
    restarted.restore(found.state())
    assert restarted.passed_over == {8, 9, 10}
    with pytest.raises(TrainingError):
        restarted.act(Trouble("spike", (30,), "high"), "")


def test_only_who_skips_watches_every_step() -> None:
    assert guards(on_nonfinite="skip").watches(1_000_000)
    assert not guards().watches(1)


# --- when a checkpoint is due ---------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mmflow.training.loop.time.monotonic", clock)
    return clock


def test_a_checkpoint_is_due_by_steps_and_by_minutes(clock: Clock) -> None:
    due = Due(every_steps=10, every_minutes=2)
    assert due.reason(9, due.signals()) is None
    assert due.reason(10, due.signals()) == "steps"
    clock.now = 119
    assert due.reason(11, due.signals()) is None
    clock.now = 121
    assert due.reason(12, due.signals()) == "minutes"
    assert due.reason(13, due.signals()) is None
    assert Due(every_steps=10, every_minutes=None).signals()["old"] == 0


def test_a_node_that_is_to_go_is_asked_for_now_and_then_and_saved_for_once(clock: Clock) -> None:
    answers = iter([False, True, True])
    asked = []

    def preempted() -> bool:
        asked.append(clock.now)
        return next(answers)

    due = Due(every_steps=1000, every_minutes=None, preempted=preempted)
    reasons = []
    for clock.now in (1.0, 6.0, 7.0, 12.0, 18.0):
        reasons.append(due.reason(1, due.signals()))
    assert asked == [6.0, 12.0, 18.0]
    assert reasons == [None, None, None, "preemption", None]


# --- whom a hang is blamed on ---------------------------------------------------------------------------------------


def test_the_rank_that_is_behind_is_named() -> None:
    beats = {
        0: Beat(step=7, doing="computing", since=100, said=158),
        1: Beat(step=7, doing="loading", since=98, said=159),
        2: Beat(step=7, doing="computing", since=101, said=157),
    }
    assert laggards(beats, 3, now=160, dead_after=60) == "rank 1 stands at step 7, loading, for 62 s"


def test_a_rank_that_is_silent_is_named_before_one_that_is_behind() -> None:
    beats = {
        0: Beat(step=7, doing="loading", since=100, said=159),
        1: Beat(step=8, doing="computing", since=50, said=60),
    }
    assert laggards(beats, 3, now=160, dead_after=60) == (
        "rank 1 has not been heard of for 100 s, since step 8; rank 2 was never heard of"
    )


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_least_share_of_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        available, total = 60, 100

    files: dict[str, int | None] = {"memory.max": None, "memory.current": None}
    monkeypatch.setattr(metrics.psutil, "virtual_memory", Machine)
    monkeypatch.setattr(metrics, "_cgroup", files.__getitem__)
    monkeypatch.setattr(metrics, "_reclaimable", lambda: 100)
    assert free_memory_share(torch.device("cpu")) == 0.6
    files |= {"memory.max": 1000, "memory.current": 900}
    assert free_memory_share(torch.device("cpu")) == pytest.approx(0.2)
