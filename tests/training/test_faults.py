"""Whole trainings by real ranks with faults: killed ranks, other numbers of ranks, damaged checkpoints, full disks,
samples without a finite loss, ranks that stop responding."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmflow.training.checkpoint_store import directory_of, saved_checkpoints
from mmflow.training.journal import journal_at
from tests.training.faulty_ranks import EPOCHS, VICTIM
from tests.training.ranks import assert_bit_equal
from tests.training.trainings import (
    LAST_SAVED,
    SAMPLES,
    STAGES,
    STEPS,
    Trainings,
    assert_each_sample_once_an_epoch,
    cut,
    largest_difference,
    turn,
)

pytestmark = pytest.mark.timeout(1200)  # fixtures run many trainings in turn, which takes long on a loaded machine

each_stage = pytest.mark.parametrize("stage", STAGES)
AGAIN = ("again-2", "damaged", "turned", "half")


@pytest.fixture(scope="module")
def resumed(trainings: Trainings) -> Trainings:
    """Resumed from the last checkpoint by fewer and by more ranks."""
    for num_ranks in (1, 3):
        plans = []
        for stage in STAGES:
            trainings.copy("killed" if stage == 2 else f"straight-{stage}", f"on-{num_ranks}-{stage}")
            plans.append({"name": f"on-{num_ranks}-{stage}", "training": {"zero_stage": stage}})
        trainings.run(num_ranks, *plans)
    return trainings


def newest(directory: Path) -> Path:
    """The checkpoint of the last step before the death."""
    return Path(directory_of(str(directory / "checkpoints"), 8))


@pytest.fixture(scope="module")
def same(trainings: Trainings) -> Trainings:
    """Resumed by the same number of ranks: after the death, and where the newest checkpoint is damaged."""
    trainings.copy("killed", "again-2")
    damaged = trainings.copy("killed", "damaged")
    cut(next(newest(damaged).rglob("zero_pp_rank_1*optim_states.pt")))
    turned = trainings.copy("killed", "turned")
    turn(next(newest(turned).rglob("zero_pp_rank_0*optim_states.pt")))
    half = trainings.copy("killed", "half")
    (newest(half) / "part-1.json").unlink()
    trainings.run(2, *({"name": name, "training": {"zero_stage": 2}} for name in AGAIN))
    return trainings


def test_a_killed_rank_leaves_checkpoints_and_no_package(trainings: Trainings) -> None:
    saved = saved_checkpoints(str(trainings.directory / "killed" / "checkpoints"))
    assert [checkpoint.step for checkpoint in saved] == [8, 4]
    assert not (trainings.directory / "killed" / "package").exists()


@pytest.mark.parametrize("name", AGAIN)
def test_a_restart_on_the_same_number_of_ranks_is_bit_equal_to_no_restart(same: Trainings, name: str) -> None:
    assert_bit_equal(same.weights("straight-2"), same.weights(name))
    assert [line["step"] for line in same.events(name, "started")] == [0, 8 if name == "again-2" else 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged", r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: \d+ bytes, \d+ were written"),
        ("turned", r"zero_pp_rank_0_mp_rank_00_optim_states\.pt: not the bytes that were written"),
    ],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank_and_named(same: Trainings, name: str, message: str) -> None:
    (refused,) = same.events(name, "refused")
    assert refused["step"] == 8
    assert re.search(message, refused["reason"])
    assert same.events("half", "refused") == []  # without the part of a rank the checkpoint does not exist


@each_stage
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_restart_on_another_number_of_ranks_ends_at_the_same_weights(
    resumed: Trainings, num_ranks: int, stage: int
) -> None:
    name = f"on-{num_ranks}-{stage}"
    started = resumed.events(name, "started")[-1]
    assert (started["step"], started["workers"]) == (8 if stage == 2 else LAST_SAVED, num_ranks)
    assert resumed.events(name, "refused") == []
    assert largest_difference(resumed.weights(f"straight-{stage}"), resumed.weights(name)) < 1e-5


@pytest.mark.parametrize("name", ["straight-2", "again-2"])
def test_every_sample_is_seen_once_an_epoch(same: Trainings, name: str) -> None:
    seen = same.seen(name)
    assert_each_sample_once_an_epoch(seen)
    if name == "straight-2":
        assert sum(len(keys) for keys in seen.values()) == EPOCHS * sum(SAMPLES)


# --- numbers that are not finite -------------------------------------------------------------------------------------

POISONED_STAGES = (0, 1, 2, 3)
SPIKE = {"on_nonfinite": "stop", "spike_window": 10, "spike_deviations": 20}


def guarded(name: str, stage: int, poison: str, **guards: Any) -> dict[str, Any]:
    return {"name": name, "poison": poison, "training": {"zero_stage": stage, "guards": guards}}


@pytest.fixture(scope="module")
def poisoned(place: Trainings) -> Trainings:
    plans = [
        guarded(f"{policy}-{kind}-{stage}", stage, kind, on_nonfinite=policy)
        for stage in POISONED_STAGES
        for policy, kind in (("skip", "loss"), ("skip", "gradient"), ("rewind", "loss"), ("rewind", "gradient"))
    ]
    plans += [
        guarded("spike-rewind", 2, "spike", on_spike="rewind", **SPIKE),
        guarded("spike-record", 2, "spike", on_spike="record", **SPIKE),
        guarded("spike-enough", 2, "spike", on_spike="rewind", max_rewinds=0, **SPIKE),
    ]
    for stage in POISONED_STAGES:
        for kind in ("loss", "gradient"):
            plan = guarded(f"stop-{kind}-{stage}", stage, kind)
            plan["training"]["checkpoint_every_steps"] = 1
            plans.append(plan)
    place.run(1, *plans)
    return place


@pytest.mark.parametrize("stage", POISONED_STAGES)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_sample_without_a_finite_loss_is_left_out_and_named(poisoned: Trainings, kind: str, stage: int) -> None:
    name = f"skip-{kind}-{stage}"
    assert poisoned.error(name) == ""
    left_out = poisoned.events(name, "left_out")
    victims = [step for step, keys in poisoned.seen(name).items() if VICTIM in keys]
    assert [line["step"] for line in left_out] == sorted(victims)
    assert len(victims) == EPOCHS
    for line in left_out:
        assert VICTIM in line["samples"]["00001"]
        assert sorted(key for keys in line["samples"].values() for key in keys) == sorted(
            poisoned.seen(name)[line["step"]]
        )
    lines = [line for line in journal_at(str(poisoned.directory / name / "journal.jsonl")) if "metrics" in line]
    assert lines[-1]["metrics"]["skipped_steps"] == EPOCHS
    assert lines[-1]["metrics"]["learning_rate"] == pytest.approx(_learning_rate(poisoned))
    assert all(value.isfinite().all() for value in poisoned.weights(name).values())


def _learning_rate(place: Trainings) -> float:
    """The last learning rate of a run that leaves nothing out."""
    lines = [line for line in journal_at(str(place.directory / "spike-record" / "journal.jsonl")) if "metrics" in line]
    return float(lines[-1]["metrics"]["learning_rate"])


@pytest.mark.parametrize("stage", POISONED_STAGES)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_rewinding_ends_at_the_weights_of_leaving_out(poisoned: Trainings, kind: str, stage: int) -> None:
    name = f"rewind-{kind}-{stage}"
    assert poisoned.error(name) == ""
    assert len(poisoned.events(name, "rewound")) == EPOCHS
    assert_bit_equal(poisoned.weights(f"skip-{kind}-{stage}"), poisoned.weights(name))


@pytest.mark.parametrize("stage", POISONED_STAGES)
@pytest.mark.parametrize(
    ("kind", "event", "message"),
    [
        ("loss", "nonfinite", "the loss is nan; "),
        ("gradient", "spoilt", "a weight is not finite, so nothing is saved; "),
    ],
)
def test_without_a_policy_the_run_stops_before_it_saves_and_names_the_step(
    poisoned: Trainings, kind: str, event: str, message: str, stage: int
) -> None:
    name = f"stop-{kind}-{stage}"
    victim = min(step for step, keys in poisoned.seen(name).items() if VICTIM in keys)
    (line,) = poisoned.events(name, event)
    assert line["steps"] == [victim]
    assert VICTIM in line["samples"]["00001"]
    assert poisoned.error(name).startswith(f"step {victim}: {message}")
    # A restart from a checkpoint with NaN would fail forever.
    assert max(saved.step for saved in saved_checkpoints(str(poisoned.directory / name / "checkpoints"))) == victim - 1


def test_a_spike_is_rewound_or_recorded_or_ends_the_run(poisoned: Trainings) -> None:
    (spike,) = poisoned.events("spike-record", "spike")
    step = max(step for step, keys in poisoned.seen("spike-record").items() if VICTIM in keys)
    assert spike["steps"] == [step]
    assert poisoned.error("spike-record") == ""
    assert poisoned.error("spike-rewind") == ""
    assert [line["steps"] for line in poisoned.events("spike-rewind", "rewound")] == [[step]]
    lines = [
        line for line in journal_at(str(poisoned.directory / "spike-rewind" / "journal.jsonl")) if "metrics" in line
    ]
    assert lines[-1]["metrics"]["skipped_steps"] == 2  # the batch that spiked, and the one before it
    assert poisoned.error("spike-enough").startswith(f"step {step}: the loss is ")


def test_a_restart_knows_the_rewinds_before_it(poisoned: Trainings) -> None:
    (rewound,) = poisoned.events("spike-rewind", "rewound")
    here = poisoned.copy("spike-rewind", "remembered")
    for saved in saved_checkpoints(str(here / "checkpoints")):
        if saved.step > rewound["step"]:
            shutil.rmtree(saved.uri)
    poisoned.run(1, guarded("remembered", 2, "spike", on_spike="rewind", **SPIKE))
    assert poisoned.events("remembered", "started")[-1]["step"] == rewound["step"]
    assert poisoned.events("remembered", "rewound") == [rewound]
    assert_bit_equal(poisoned.weights("spike-rewind"), poisoned.weights("remembered"))


# --- full disks, and ranks that stop responding ----------------------------------------------------------------------


def test_a_full_disk_costs_the_checkpoint_or_the_run_as_the_recipe_says(
    place: Trainings, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("48k")
    stop = {"zero_stage": 2, "checkpoints": {"without_room": "stop"}}
    place.run(
        1,
        {"name": "no-room", "training": {"zero_stage": 2}, "checkpoints": str(disk / "one")},
        {"name": "no-room-stop", "training": stop, "checkpoints": str(disk / "two")},
    )
    assert place.error("no-room") == ""
    assert (place.directory / "no-room" / "package").exists()
    events = place.events("no-room", "no_checkpoint")
    assert [line["step"] for line in events] == [4, 8, 12]
    assert place.events("no-room", "checkpoint") == []
    assert "MB are free; make room" in events[0]["reason"]
    assert not list(disk.rglob("*.pt"))
    assert place.error("no-room-stop").startswith("step 4: no checkpoint: rank 0: ")


def test_a_disk_that_fills_up_during_a_checkpoint_costs_that_checkpoint(
    place: Trainings, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("80k")  # a first checkpoint of so small a model needs more than estimated
    place.run(1, {"name": "fills", "training": {"zero_stage": 2}, "checkpoints": str(disk / "one")})
    assert place.error("fills") == ""
    assert len(place.events("fills", "no_checkpoint")) == 3
    assert saved_checkpoints(str(disk / "one")) == []


def test_a_rank_that_stops_responding_is_named(place: Trainings) -> None:
    guards = {"hung_after_minutes": 0.05}
    plan = {"name": "hung", "training": {"zero_stage": 2, "guards": guards}, "sleep": [1, 3]}
    place.run(2, plan, dies=True, exchange_seconds=6)
    (hung,) = place.events("hung", "hung")
    assert hung["reason"].startswith("rank 1 is at step 3, loading, for ")
    assert "rank 1 is at step 3, loading" in place.error("hung")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_ranks_killed_at_any_moment_end_at_the_same_weights(trainings: Trainings, seed: int) -> None:
    """Three kills, at a step or during a checkpoint, each resumed by a drawn number of ranks."""
    draw = random.Random(seed)
    stage, name = draw.choice(STAGES), f"sweep-{seed}"
    num_ranks = 2
    for _ in range(3):
        victim = draw.randrange(num_ranks)
        fate = draw.choice(["die", "die_while_saving"])
        moment = draw.randint(2, STEPS) if fate == "die" else draw.randint(1, 12)
        trainings.run(num_ranks, {"name": name, "training": {"zero_stage": stage}, fate: [victim, moment]}, dies=True)
        num_ranks = draw.randint(1, 3)
    trainings.run(num_ranks, {"name": name, "training": {"zero_stage": stage}})
    assert largest_difference(trainings.weights(f"straight-{stage}"), trainings.weights(name)) < 1e-5
    assert sorted(trainings.seen(name)) == list(range(1, STEPS + 1))
