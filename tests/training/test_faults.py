"""Whole trainings by real ranks, and what befalls them: killed ranks, other numbers of ranks, damaged checkpoints, full
disks, samples that give no number, ranks that do not come."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mmflow.shards.dataset import Dataset
from mmflow.training.store import saved_checkpoints
from mmflow.training.telemetry import read_journal
from tests.shards.handmade import Handmade, write_dataset
from tests.training.faulty_ranks import BATCH, EPOCHS, EVERY, VICTIM
from tests.training.tiny_training import cut

pytestmark = pytest.mark.timeout(1200)  # fixtures run many trainings in turn, which a loaded machine takes long over

ROOT = Path(__file__).parents[2]
SAMPLES = (9, 14, 8)  # of each shard
STEPS_PER_EPOCH = -(-sum(SAMPLES) // BATCH)
STEPS = EPOCHS * STEPS_PER_EPOCH
LAST_SAVED = (STEPS - 1) // EVERY * EVERY
KILLED_AT = 10
STAGES = (1, 2, 3)
each_stage = pytest.mark.parametrize("stage", STAGES)


class Trainings:
    """A directory with a dataset, and the trainings of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs = 0
        self.dataset = dataset_in(directory)
        self.tokenizer = directory / "tokenizer.json"
        words = [f"picture-{number}" for number in range(sum(SAMPLES))]
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(
            models.WordLevel({word: id for id, word in enumerate(special + words)}, unk_token="[UNK]")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(special)
        tokenizer.save(str(self.tokenizer))

    def run(self, num_ranks: int, *plans: dict[str, Any], dies: bool = False, exchange_seconds: float = 60) -> None:
        """Go through the trainings; with `dies`, rank 0 ends before they do, and the others are not waited for long."""
        self.runs += 1
        shared = {"dataset": self.dataset.uri, "tokenizer": str(self.tokenizer)}
        text = json.dumps([{**shared, **plan} for plan in plans])
        environment = {
            **os.environ,
            "RENDEZVOUS": f"rendezvous-{self.runs}",
            "EXCHANGE_SECONDS": str(exchange_seconds),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.training.faulty_ranks"]
        logs = [self.directory / f"log-{self.runs}-{rank}" for rank in range(num_ranks)]
        ranks = []
        for rank, log in enumerate(logs):
            arguments = [*command, str(rank), str(num_ranks), str(self.directory), text]
            with log.open("w") as stream:
                ranks.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=stream, stderr=stream))
        try:
            codes = [ranks[0].wait(timeout=900)]
            with contextlib.suppress(subprocess.TimeoutExpired) if dies else contextlib.nullcontext():
                codes += [rank.wait(timeout=exchange_seconds + 10 if dies else 900) for rank in ranks[1:]]
        finally:
            for rank in ranks:
                rank.kill()
        if not dies:
            assert codes == [0] * num_ranks, "\n".join(log.read_text()[-3000:] for log in logs)

    def copy(self, source: str, target: str, *, without: tuple[str, ...] = ("package",)) -> Path:
        """Another training that has come as far."""
        shutil.copytree(self.directory / source, self.directory / target, ignore=shutil.ignore_patterns(*without))
        return self.directory / target

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.directory / name / "package" / "model.safetensors")

    def said(self, name: str, rank: int = 0) -> str:
        return (self.directory / name / f"said-{rank}.txt").read_text()

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_journal(self.directory / name / "journal.jsonl") if line.get("event") == kind]

    def seen(self, name: str) -> dict[int, list[str]]:
        """Step → keys over all ranks and every time that the step was taken."""
        found: dict[int, list[str]] = {}
        for path in sorted((self.directory / name).glob("seen-*.jsonl")):
            for line in map(json.loads, path.read_text().splitlines()):
                found.setdefault(line["step"], []).extend(line["keys"])
        return found


def dataset_in(directory: Path) -> Dataset:
    shards, number = [], 0
    for samples in SAMPLES:
        rows = [
            Handmade(key=f"key-{each}", captions=[{"language": "en", "text": f"picture-{each}"}], size=(24, 24))
            for each in range(number, number + samples)
        ]
        shards.append(("train", rows))
        number += samples
    return write_dataset(directory / "dataset", shards)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """A key's bias has no gradient by its mathematics, and Adam steps along the sign of its rounding error."""
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).abs().max()) for name in one if not name.endswith(("key.bias", "k_proj.bias"))
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def trainings(place: Trainings) -> Trainings:
    """Trained on two ranks at each stage without a fault, and to the death of one of them."""
    keep = {"checkpoints": {"keep_last": 9}}
    plans = [{"name": f"straight-{stage}", "training": {"zero_stage": stage, **keep}} for stage in STAGES]
    killed = {"name": "killed", "training": {"zero_stage": 2, **keep}, "die": [1, KILLED_AT]}
    place.run(2, *plans, killed, dies=True)
    assert [place.said(f"straight-{stage}") for stage in STAGES] == ["", "", ""]
    return place


@pytest.fixture(scope="module")
def others(trainings: Trainings) -> Trainings:
    """Gone on with from the last checkpoint by fewer and by more ranks."""
    for num_ranks in (1, 3):
        plans = []
        for stage in STAGES:
            trainings.copy("killed" if stage == 2 else f"straight-{stage}", f"on-{num_ranks}-{stage}")
            plans.append({"name": f"on-{num_ranks}-{stage}", "training": {"zero_stage": stage}})
        trainings.run(num_ranks, *plans)
    return trainings


@pytest.fixture(scope="module")
def same(trainings: Trainings) -> Trainings:
    """Gone on with by as many ranks: after the death, and from checkpoints of which the newest is damaged."""
    trainings.copy("killed", "again-2")
    damaged = trainings.copy("killed", "damaged")
    cut(next((damaged / "checkpoints" / "step-00000008").rglob("zero_pp_rank_1*optim_states.pt")))
    half = trainings.copy("killed", "half")
    (half / "checkpoints" / "step-00000008" / "part-1.json").unlink()
    trainings.run(2, *({"name": name, "training": {"zero_stage": 2}} for name in ("again-2", "damaged", "half")))
    return trainings


def test_a_killed_rank_leaves_checkpoints_and_no_package(trainings: Trainings) -> None:
    saved = saved_checkpoints(str(trainings.directory / "killed" / "checkpoints"))
    assert [each.step for each in saved] == [8, 4]
    assert not (trainings.directory / "killed" / "package").exists()


@pytest.mark.parametrize("name", ["again-2", "damaged", "half"])
def test_a_restart_on_as_many_ranks_is_bit_equal_to_no_restart(same: Trainings, name: str) -> None:
    expected, found = same.weights("straight-2"), same.weights(name)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [line["step"] for line in same.events(name, "started")] == [0, 8 if name == "again-2" else 4]


def test_a_checkpoint_that_was_cut_short_is_refused_on_every_rank_and_named(same: Trainings) -> None:
    (refused,) = same.events("damaged", "refused")
    assert refused["step"] == 8
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in refused["reason"]
    assert same.events("half", "refused") == []  # what its ranks did not all finish was never there


@each_stage
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_restart_on_another_number_of_ranks_ends_at_the_same_weights(
    others: Trainings, num_ranks: int, stage: int
) -> None:
    name = f"on-{num_ranks}-{stage}"
    started = others.events(name, "started")[-1]
    assert (started["step"], started["workers"]) == (8 if stage == 2 else LAST_SAVED, num_ranks)
    assert others.events(name, "refused") == []
    assert largest_difference(others.weights(f"straight-{stage}"), others.weights(name)) < 1e-5


@pytest.mark.parametrize("name", ["straight-2", "again-2"])
def test_every_sample_is_seen_once_an_epoch(same: Trainings, name: str) -> None:
    everything = sorted(f"key-{number}" for number in range(sum(SAMPLES)))
    seen = same.seen(name)
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        assert sorted({key for step in steps for key in seen[step]}) == everything
    if name == "straight-2":
        assert sum(len(keys) for keys in seen.values()) == EPOCHS * len(everything)


# --- numbers that are none ------------------------------------------------------------------------------------------

POISONED_STAGES = (0, 1, 2, 3)


def guarded(name: str, stage: int, poison: str, **guards: Any) -> dict[str, Any]:
    return {"name": name, "poison": poison, "training": {"zero_stage": stage, "guards": guards}}


@pytest.fixture(scope="module")
def poisoned(place: Trainings) -> Trainings:
    plans = [
        guarded(f"{policy}-{kind}-{stage}", stage, kind, on_nonfinite=policy)
        for stage in POISONED_STAGES
        for policy, kind in (("skip", "loss"), ("skip", "gradient"), ("rewind", "loss"), ("rewind", "gradient"))
    ]
    spike = {"on_nonfinite": "stop", "spike_window": 10, "spike_deviations": 20}
    plans += [
        guarded("stop", 2, "loss"),
        guarded("spike-rewind", 2, "spike", on_spike="rewind", **spike),
        guarded("spike-record", 2, "spike", on_spike="record", **spike),
        guarded("spike-enough", 2, "spike", on_spike="rewind", max_rewinds=0, **spike),
    ]
    place.run(1, *plans)
    return place


@pytest.mark.parametrize("stage", POISONED_STAGES)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_sample_that_gives_no_number_is_left_out_and_named(poisoned: Trainings, kind: str, stage: int) -> None:
    name = f"skip-{kind}-{stage}"
    assert poisoned.said(name) == ""
    left_out = poisoned.events(name, "left_out")
    victims = [step for step, keys in poisoned.seen(name).items() if VICTIM in keys]
    assert [line["step"] for line in left_out] == sorted(victims)
    assert len(victims) == EPOCHS
    for line in left_out:
        assert VICTIM in line["samples"]["00001"]
        assert sorted(key for keys in line["samples"].values() for key in keys) == sorted(
            poisoned.seen(name)[line["step"]]
        )
    lines = [line for line in read_journal(poisoned.directory / name / "journal.jsonl") if "metrics" in line]
    assert lines[-1]["metrics"]["skipped_steps"] == EPOCHS
    assert lines[-1]["metrics"]["learning_rate"] == pytest.approx(_learning_rate(poisoned))
    assert all(value.isfinite().all() for value in poisoned.weights(name).values())


def _learning_rate(place: Trainings) -> float:
    """The last one of a run that leaves nothing out."""
    lines = [line for line in read_journal(place.directory / "spike-record" / "journal.jsonl") if "metrics" in line]
    return float(lines[-1]["metrics"]["learning_rate"])


@pytest.mark.parametrize("stage", POISONED_STAGES)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_going_back_ends_at_what_leaving_out_does(poisoned: Trainings, kind: str, stage: int) -> None:
    name = f"rewind-{kind}-{stage}"
    assert poisoned.said(name) == ""
    assert len(poisoned.events(name, "rewound")) == EPOCHS
    expected, found = poisoned.weights(f"skip-{kind}-{stage}"), poisoned.weights(name)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_without_a_policy_the_run_stops_and_names_the_step(poisoned: Trainings) -> None:
    victim = min(step for step, keys in poisoned.seen("stop").items() if VICTIM in keys)
    assert poisoned.said("stop").startswith(f"step {victim}: the loss is nan; ")
    (event,) = poisoned.events("stop", "nonfinite")
    assert event["steps"][0] == victim
    assert VICTIM in event["samples"]["00001"]


def test_a_spike_is_gone_past_or_recorded_or_enough(poisoned: Trainings) -> None:
    (spike,) = poisoned.events("spike-record", "spike")
    step = max(step for step, keys in poisoned.seen("spike-record").items() if VICTIM in keys)
    assert spike["steps"] == [step]
    assert poisoned.said("spike-record") == ""
    assert poisoned.said("spike-rewind") == ""
    assert [line["steps"] for line in poisoned.events("spike-rewind", "rewound")] == [[step]]
    lines = [line for line in read_journal(poisoned.directory / "spike-rewind" / "journal.jsonl") if "metrics" in line]
    assert lines[-1]["metrics"]["skipped_steps"] == 2  # the batch that spiked, and the one before it
    assert poisoned.said("spike-enough").startswith(f"step {step}: the loss is ")


# --- room, and ranks that do not come -------------------------------------------------------------------------------


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
    assert place.said("no-room") == ""
    assert (place.directory / "no-room" / "package").exists()
    events = place.events("no-room", "no_checkpoint")
    assert [line["step"] for line in events] == [4, 8, 12]
    assert place.events("no-room", "checkpoint") == []
    assert "MB are free; make room" in events[0]["reason"]
    assert not list(disk.rglob("*.pt"))
    assert place.said("no-room-stop").startswith("step 4: no checkpoint: rank 0: ")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_costs_that_checkpoint(
    place: Trainings, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("80k")  # a first checkpoint of so small a model needs more than is thought
    place.run(1, {"name": "fills", "training": {"zero_stage": 2}, "checkpoints": str(disk / "one")})
    assert place.said("fills") == ""
    assert len(place.events("fills", "no_checkpoint")) == 3
    assert saved_checkpoints(str(disk / "one")) == []


def test_a_rank_that_does_not_come_is_named(place: Trainings) -> None:
    guards = {"hung_after_minutes": 0.05}
    plan = {"name": "hung", "training": {"zero_stage": 2, "guards": guards}, "sleep": [1, 3]}
    place.run(2, plan, dies=True, exchange_seconds=6)
    (hung,) = place.events("hung", "hung")
    assert hung["reason"].startswith("rank 1 stands at step 3, loading, for ")
    assert "rank 1 stands at step 3, loading" in place.said("hung")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@each_stage
def test_a_lost_node_shrinks_the_group_and_a_new_one_grows_it(trainings: Trainings, stage: int) -> None:
    epochs = 200
    training = {
        "zero_stage": stage,
        "epochs": epochs,
        "checkpoint_every_steps": 50,
        "num_workers": [1, 2],
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 2},
    }
    plan = {"dataset": trainings.dataset.uri, "tokenizer": str(trainings.tokenizer), "name": f"nodes-{stage}"}
    step = random.Random(stage).randint(100, 300)
    command = [sys.executable, "-m", "tests.training.losing_nodes", str(trainings.directory)]
    command += [json.dumps({**plan, "training": training}), str(step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    started = trainings.events(plan["name"], "started")
    assert [line["workers"] for line in started[:2]] == [2, 1]
    assert started[1]["step"] >= step - 50
    lines = list(read_journal(trainings.directory / plan["name"] / "journal.jsonl"))
    assert max(line["step"] for line in lines) == epochs * STEPS_PER_EPOCH
    trainings.run(1, {"name": f"alone-{stage}", "training": {**training, "num_workers": 1}})
    expected, found = trainings.weights(f"alone-{stage}"), trainings.weights(plan["name"])
    assert largest_difference(expected, found) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_ranks_killed_at_any_moment_go_on_to_the_same_weights(trainings: Trainings, seed: int) -> None:
    """Three deaths, at a step or while a checkpoint is brought to its place, each gone on from by another number."""
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
