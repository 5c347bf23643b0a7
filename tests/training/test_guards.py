"""What counts as a spike and what follows, when a checkpoint is due, and which rank is named for a hang."""

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


def guards_of(**changes: Any) -> Guards:
    return Guards(GuardsConfig(spike_window=20, **changes))


def trouble_in(losses: list[float], **changes: Any) -> Trouble | None:
    """The trouble in losses from step 1 on."""
    by_step = dict(enumerate(losses, 1))
    return guards_of(**changes).check(by_step, dict.fromkeys(by_step, 0))


@pytest.mark.parametrize("seed", range(20))
def test_a_falling_loss_has_no_spikes(seed: int) -> None:
    assert trouble_in(falling(500, seed)) is None


def test_a_spike_is_found_and_does_not_hide_the_next() -> None:
    losses = falling(100)
    losses[59], losses[60], losses[69] = 9.0, 12.0, 9.5
    trouble = trouble_in(losses)
    assert trouble is not None
    assert (trouble.kind, trouble.steps) == ("spike", (60, 61, 70))
    assert "9, far above" in trouble.message


def test_nothing_is_a_spike_before_half_of_the_window_is_known() -> None:
    assert trouble_in([*[1.0] * 9, 50.0]) is None
    assert trouble_in([*[1.0] * 10, 50.0]) is not None


@pytest.mark.parametrize(
    ("losses", "deviations", "limit"),
    [
        ([2.0] * 50, 8, 2.0 * 1.08),  # a nearly constant loss may move a little
        ([], 8, math.inf),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2, 3 + 2 * 1.4826),  # median 3; absolute deviations 2 1 0 1 2 with median 1
    ],
)
def test_the_limit_of_a_spike(losses: list[float], deviations: float, limit: float) -> None:
    assert spike_limit(losses, deviations) == pytest.approx(limit)


def test_a_loss_that_is_not_finite_is_trouble_for_any_window() -> None:
    trouble = trouble_in([1.0, math.nan, math.inf], on_spike="ignore")
    assert trouble == Trouble("nonfinite", (2, 3), "the loss is nan")


def test_policies() -> None:
    nonfinite, spike = Trouble("nonfinite", (6, 8), "the loss is nan"), Trouble("spike", (9, 10), "high")
    with pytest.raises(TrainingError, match=r"^step 6: the loss is nan; do this$"):
        guards_of().act(nonfinite, "do this")
    guards_of(on_nonfinite="skip").act(nonfinite, "")
    guards_of().act(spike, "")  # is recorded
    with pytest.raises(Rewind):
        guards_of(on_spike="rewind").act(spike, "")


def test_rewinds_are_bounded_and_known_to_a_restart() -> None:
    guards = guards_of(on_spike="rewind", on_nonfinite="rewind", max_rewinds=2)
    guards.rewound(Trouble("spike", (9, 10), "high"))
    assert guards.passed_over == {8, 9, 10}
    assert not guards.watches(5)
    guards.rewound(Trouble("nonfinite", (20, 22), "the loss is nan"))
    assert guards.watches(22)
    assert not guards.watches(23)
    with pytest.raises(TrainingError, match="after 2 rewinds"):
        guards.act(Trouble("spike", (30,), "high"), "")
    restarted = guards_of(on_spike="rewind", max_rewinds=2)
    restarted.restore(guards.state())
    assert restarted.passed_over == {8, 9, 10}
    with pytest.raises(TrainingError):
        restarted.act(Trouble("spike", (30,), "high"), "")


def test_only_skip_watches_every_step() -> None:
    assert guards_of(on_nonfinite="skip").watches(1_000_000)
    assert not guards_of().watches(1)


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
    reasons = []
    for step, clock.now in ((9, 0), (10, 0), (11, 119), (12, 121), (13, 121)):
        reasons.append(due.reason(step, due.signals()))
    assert reasons == [None, "steps", None, "minutes", None]
    assert Due(every_steps=10, every_minutes=None).signals()["old"] == 0


def test_preemption_is_asked_for_every_few_seconds_and_saved_for_once(clock: Clock) -> None:
    answers, asked = iter([False, True, True]), []

    def preempted() -> bool:
        asked.append(clock.now)
        return next(answers)

    due = Due(every_steps=1000, every_minutes=None, preempted=preempted)
    reasons = []
    for clock.now in (1.0, 6.0, 7.0, 12.0, 18.0):
        reasons.append(due.reason(1, due.signals()))
    assert asked == [6.0, 12.0, 18.0]
    assert reasons == [None, None, None, "preemption", None]


# --- which rank is named for a hang ---------------------------------------------------------------------------------


def test_the_rank_that_is_behind_is_named() -> None:
    beats = {
        0: Beat(step=7, doing="computing", since=100, time=158),
        1: Beat(step=7, doing="loading", since=98, time=159),
        2: Beat(step=7, doing="computing", since=101, time=157),
    }
    assert laggards(beats, 3, now=160, dead_after=60) == "rank 1 is at step 7, loading, for 62 s"


def test_a_silent_rank_is_named_before_one_that_is_behind() -> None:
    beats = {
        0: Beat(step=7, doing="loading", since=100, time=159),
        1: Beat(step=8, doing="computing", since=50, time=60),
    }
    assert laggards(beats, 3, now=160, dead_after=60) == (
        "rank 1 has sent nothing for 100 s, since step 8; rank 2 has never sent anything"
    )


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_smallest_share_of_free_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        available, total = 60, 100

    monkeypatch.setattr(metrics.psutil, "virtual_memory", Machine)
    monkeypatch.setattr(metrics, "CGROUP", tmp_path)
    assert free_memory_share(torch.device("cpu")) == 0.6
    for name, text in {"max": "1000", "current": "900", "stat": "anon 800\ninactive_file 40\nactive_file 60"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert free_memory_share(torch.device("cpu")) == pytest.approx(0.2)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_share(torch.device("cpu")) == 0.6
