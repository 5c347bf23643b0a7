"""Training by a real DeepSpeed engine: a restart is bit-exact at every ZeRO stage, and what is not whole is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmflow.models.model import MAX_LOGIT_SCALE
from mmflow.training.journal import curves, read_journal
from tests.training.tiny_training import (
    BATCH,
    CHECKPOINT_EVERY,
    DAMAGES,
    DROPPING_STAGES,
    LOG_EVERY,
    STORE,
    TOTAL_STEPS,
    ZERO_STAGES,
    learner,
)

each_zero_stage = pytest.mark.parametrize("zero_stage", ZERO_STAGES)
ROOT = Path(__file__).parents[2]


def perform(*acts: str, directory: Path) -> None:
    """A process of its own: it may hold no engine, random state or module of the acts before."""
    command = [sys.executable, "-m", "tests.training.tiny_training", *acts, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Straight runs in one process; resumed ones, damaged checkpoints and poisoned losses in another."""
    directory = tmp_path_factory.mktemp("training")
    perform("straight", directory=directory)
    for name, damage in DAMAGES.items():
        shutil.copytree(directory / "straight-2" / STORE, directory / name / STORE)
        damage(directory / name / STORE)
    perform("resumed", "damaged", "poisoned", "dropped", "bf16", directory=directory)
    return directory


def result(directory: Path, name: str) -> dict[str, Any]:
    return dict(torch.load(directory / name / "result.pt", weights_only=True))


def losses(directory: Path, name: str) -> dict[int, float]:
    return dict(curves(read_journal(directory / name / "journal.jsonl"))["loss"])


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@each_zero_stage
def test_a_restart_from_a_checkpoint_is_bit_equal_to_no_restart(directory: Path, zero_stage: int) -> None:
    straight, resumed = result(directory, f"straight-{zero_stage}"), result(directory, f"resumed-{zero_stage}")
    assert_bit_equal(resumed["after"], straight["after"])
    assert resumed["step"] == CHECKPOINT_EVERY
    assert resumed["state"] == straight["seen"][CHECKPOINT_EVERY - 1] == (0, CHECKPOINT_EVERY * BATCH)
    assert resumed["seen"] == straight["seen"][CHECKPOINT_EVERY:]
    assert len(straight["seen"]) == TOTAL_STEPS


@each_zero_stage
def test_a_restart_writes_the_lines_of_an_unbroken_journal(directory: Path, zero_stage: int) -> None:
    straight, resumed = losses(directory, f"straight-{zero_stage}"), losses(directory, f"resumed-{zero_stage}")
    assert list(straight) == [LOG_EVERY, CHECKPOINT_EVERY, 2 * LOG_EVERY, TOTAL_STEPS]
    assert resumed == {step: loss for step, loss in straight.items() if step > CHECKPOINT_EVERY}


@each_zero_stage
def test_training_changes_every_weight_and_lowers_the_loss(directory: Path, zero_stage: int) -> None:
    found = result(directory, f"straight-{zero_stage}")
    # An attention's key bias and a bias that a batch norm takes out again have no gradient by their mathematics.
    still = [name for name, value in found["before"].items() if torch.equal(value, found["after"][name])]
    assert [name for name in still if not name.endswith("bias")] == []
    by_step = losses(directory, f"straight-{zero_stage}")
    assert by_step[TOTAL_STEPS] < by_step[LOG_EVERY]


@each_zero_stage
def test_whole_state_is_the_module_s_own(directory: Path, zero_stage: int) -> None:
    """Every parameter in full and every buffer, of the shapes that a package needs, whatever ZeRO made of them."""
    assert_bit_equal(result(directory, f"straight-{zero_stage}")["before"], dict(learner().state_dict()))


@each_zero_stage
def test_zero_stages_and_precisions_train_the_same_model(directory: Path, zero_stage: int) -> None:
    expected = losses(directory, "straight-0")
    assert losses(directory, f"straight-{zero_stage}") == pytest.approx(expected, rel=1e-5)
    half = losses(directory, f"bf16-{zero_stage}")
    assert half == pytest.approx(expected, rel=0.1)
    assert half != pytest.approx(expected, rel=1e-5)  # it did compute in half precision
    state = result(directory, f"bf16-{zero_stage}")["after"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def test_journal_has_what_a_morning_needs(directory: Path) -> None:
    lines = list(read_journal(directory / "straight-2" / "journal.jsonl"))
    found = curves(lines)
    assert {"loss", "contrastive", "logit_scale", "learning_rate", "gradient_norm", "samples_per_second"} <= set(found)
    assert all(value > 0 for _, value in found["gradient_norm"])
    assert all(0 < value <= 2.72**MAX_LOGIT_SCALE for _, value in found["logit_scale"])
    # Steps 5 and 6 make the line of step 6, of which 5 closes the epoch with a batch half of which is padding.
    waste = dict(found["padding_waste"])
    assert waste[LOG_EVERY] == 0
    assert waste[2 * LOG_EVERY] == pytest.approx(0.25)
    events = [line for line in lines if "event" in line]
    assert [(each["step"], each["event"], each["epoch"], each["position"]) for each in events] == [
        (CHECKPOINT_EVERY, "checkpoint", 0, CHECKPOINT_EVERY * BATCH)
    ]


def test_no_gradient_norm_is_told_where_deepspeed_has_none(directory: Path) -> None:
    assert "gradient_norm" not in curves(read_journal(directory / "straight-0" / "journal.jsonl"))


def test_learning_rate_warms_up_and_decays(directory: Path) -> None:
    rates = dict(curves(read_journal(directory / "straight-2" / "journal.jsonl"))["learning_rate"])
    assert rates[LOG_EVERY] == pytest.approx(0.01)
    assert list(rates.values()) == sorted(rates.values(), reverse=True)


@pytest.mark.parametrize("zero_stage", DROPPING_STAGES)
def test_a_step_that_deepspeed_drops_counts_in_the_schedule(directory: Path, zero_stage: int) -> None:
    straight, dropped = (
        curves(read_journal(directory / f"{name}-{zero_stage}" / "journal.jsonl")) for name in ("straight", "dropped")
    )
    assert [skipped for _, skipped in dropped["skipped_steps"]] == [1.0] * len(straight["loss"])
    assert dropped["learning_rate"] == straight["learning_rate"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_what_was_written_is_refused(directory: Path, damage: str) -> None:
    store = directory / damage / STORE
    refused, raised = torch.load(directory / "said.pt", weights_only=True)[damage]
    assert refused.startswith(f"refused {CHECKPOINT_EVERY}: rank 0: {store}/step-"), refused
    assert raised.startswith(f"{store}: none of its 1 checkpoints can be used")
    assert "delete the directory" in raised
    assert "\n" not in refused + raised


@each_zero_stage
@pytest.mark.parametrize(
    ("kind", "said", "position"),
    [
        ("loss", "step 2: the loss is nan; ", BATCH),
        ("gradient", "step 3: a weight is not finite, so nothing is saved; ", 2 * BATCH),
    ],
)
def test_what_is_not_a_number_ends_the_run_before_it_is_saved(
    directory: Path, zero_stage: int, kind: str, said: str, position: int
) -> None:
    message, saved = torch.load(directory / "found.pt", weights_only=True)[kind, zero_stage]
    assert message.startswith(said), message
    assert f"epoch 0 from position {position} on" in message
    assert saved == []  # a restart from a checkpoint of NaN would fail for ever
