"""Training with a real DeepSpeed engine: a restart is bit-equal at every ZeRO stage, and the journal is complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.learning.learner import Learner, Parts
from mmflow.learning.outputs import MaskingTokens
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import MAX_LOGIT_SCALE
from mmflow.training.checkpoints import Checkpoints
from mmflow.training.config import CheckpointsConfig, GuardsConfig, TrainingConfig
from mmflow.training.engine import build_engine, whole_state
from mmflow.training.guards import Guards
from mmflow.training.journal import Journal, curves, journal_at
from mmflow.training.loop import Due, TrainingLoop
from tests.tiny import SMALLEST_MODEL
from tests.training.ranks import assert_bit_equal, fresh_learner, main, perform, random_batch

STAGES = (0, 1, 2, 3)
DROPPING_STAGES = (1, 2)  # ZeRO 3 checks only in fp16
TOTAL_STEPS, CHECKPOINT_EVERY, LOG_EVERY = 8, 4, 3
BATCH, STEPS_PER_EPOCH, VOCABULARY = 6, 5, 64

# Dropout, so that the random state matters; batch norm, so that buffers do.
TEXT = SMALLEST_MODEL["text"]
MODEL = ModelConfig.model_validate(
    {**SMALLEST_MODEL, "text": {**TEXT, "options": {**TEXT["options"], "hidden_dropout_prob": 0.3}}}
)


def dropping_learner() -> Learner:
    return fresh_learner(MODEL, {}, special=MaskingTokens(None, (), VOCABULARY))


def engine_of(zero_stage: int, module: Learner | None = None, precision: str = "fp32") -> Any:
    fields = {
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 3},
        "zero_stage": zero_stage,
        "precision": precision,
        "global_batch_size": BATCH,
    }
    engine = build_engine(module or dropping_learner(), TrainingConfig.model_validate(fields), TOTAL_STEPS)
    torch.manual_seed(5)
    return engine


def source(state: LoaderState, seen: list[tuple[int, int]]) -> Iterator[Batch]:
    """Endless batches that follow from their position alone; the last of an epoch is half padding."""
    while True:
        seed, step = 1000 * state.epoch + state.position, state.position // BATCH + 1
        is_last = step == STEPS_PER_EPOCH
        state = LoaderState(state.epoch + 1) if is_last else LoaderState(state.epoch, step * BATCH)
        seen.append((state.epoch, state.position))
        yield random_batch(seed, BATCH, real=torch.arange(BATCH) < (BATCH // 2 if is_last else BATCH), state=state)


def checkpoints_in(directory: Path) -> Checkpoints:
    return Checkpoints(str(directory / "checkpoints"), CheckpointsConfig(), Journal())


def run(engine: Any, directory: Path, step: int = 0, state: LoaderState | None = None) -> list[tuple[int, int]]:
    """Train to the last step; the (epoch, position) after each."""
    seen: list[tuple[int, int]] = []
    checkpoints = checkpoints_in(directory)
    with contextlib.closing(Journal(directory / "journal.jsonl")) as journal:
        state = state or LoaderState()
        loop = TrainingLoop(
            engine=engine,
            total_steps=TOTAL_STEPS,
            log_every=LOG_EVERY,
            due=Due(every_steps=CHECKPOINT_EVERY, every_minutes=None),
            save=lambda step, state, metrics, reason: checkpoints.save(engine, step, state, metrics),
            guards=Guards(GuardsConfig()),
            journal=journal,
            shard_name=lambda dataset, shard: f"{shard:05d}",
        )
        loop.run(source(state, seen), first_step=step, state=state)
        checkpoints.finish(TOTAL_STEPS)
    return seen


# --- the acts -------------------------------------------------------------------------------------------------------


def straight(directory: Path) -> dict[Any, Any]:
    """Eight steps at each ZeRO stage, with a checkpoint."""
    results = {}
    for stage in STAGES:
        engine = engine_of(stage)
        before = whole_state(engine.module)
        seen = run(engine, directory / f"straight-{stage}")
        results[stage] = {"before": before, "after": whole_state(engine.module), "seen": seen}
    return results


def resumed(directory: Path) -> dict[Any, Any]:
    """From the checkpoint of step 4, in a new process."""
    results = {}
    for stage in STAGES:
        engine = engine_of(stage)
        torch.manual_seed(99)  # the checkpoint must win over what the process happens to hold
        checkpoints = checkpoints_in(directory / f"straight-{stage}")
        saved = next(checkpoints.newest())
        state = checkpoints.load(engine, saved, seed=1)
        assert state is not None
        seen = run(engine, directory / f"resumed-{stage}", saved.step, state)
        results[stage] = {
            "after": whole_state(engine.module),
            "seen": seen,
            "step": saved.step,
            "state": (state.epoch, state.position),
        }
    return results


class Overflowing(Learner):
    """A learner with an infinite gradient at its third step."""

    def forward(self, batch: Batch, step: int, *more: Any, **options: Any) -> tuple[Tensor, Parts]:
        loss, parts = super().forward(batch, step, *more, **options)
        return loss + (loss - loss).sqrt() if step == 3 else loss, parts  # value 0, slope infinite


def dropped(directory: Path) -> None:
    """A step that DeepSpeed drops because of its gradients, as in fp16, which needs accelerators."""
    for stage in DROPPING_STAGES:
        module = dropping_learner()
        module.__class__ = Overflowing
        engine = engine_of(stage, module)
        engine.optimizer.check_grad_overflow = True
        run(engine, directory / f"dropped-{stage}")


def bf16(directory: Path) -> dict[Any, Any]:
    """Half precision at each ZeRO stage."""
    results = {}
    for stage in STAGES:
        engine = engine_of(stage, precision="bf16")
        run(engine, directory / f"bf16-{stage}")
        results[stage] = {"after": whole_state(engine.module)}
    return results


# --- what they show -------------------------------------------------------------------------------------------------

each_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("training")
    perform("test_loop", 1, directory, "straight")
    perform("test_loop", 1, directory, "resumed", "dropped", "bf16")
    return directory


def result(directory: Path, act: str, stage: int) -> dict[str, Any]:
    return dict(torch.load(directory / f"{act}.pt", weights_only=True)[stage])


def curves_of(directory: Path, name: str) -> dict[str, dict[int, float]]:
    lines = journal_at(str(directory / name / "journal.jsonl"))
    return {metric: dict(points) for metric, points in curves(lines).items()}


@each_stage
def test_a_restart_from_a_checkpoint_is_bit_equal_to_no_restart(directory: Path, stage: int) -> None:
    straight, resumed = result(directory, "straight", stage), result(directory, "resumed", stage)
    assert_bit_equal(resumed["after"], straight["after"])
    assert resumed["step"] == CHECKPOINT_EVERY
    assert resumed["state"] == straight["seen"][CHECKPOINT_EVERY - 1] == (0, CHECKPOINT_EVERY * BATCH)
    assert resumed["seen"] == straight["seen"][CHECKPOINT_EVERY:]
    assert len(straight["seen"]) == TOTAL_STEPS


@each_stage
def test_a_restart_writes_the_lines_of_an_unbroken_journal(directory: Path, stage: int) -> None:
    straight, resumed = (curves_of(directory, f"{act}-{stage}")["loss"] for act in ("straight", "resumed"))
    assert list(straight) == [LOG_EVERY, CHECKPOINT_EVERY, 2 * LOG_EVERY, TOTAL_STEPS]
    assert resumed == {step: loss for step, loss in straight.items() if step > CHECKPOINT_EVERY}


@each_stage
def test_training_changes_every_weight_and_lowers_the_loss(directory: Path, stage: int) -> None:
    states = result(directory, "straight", stage)
    # An attention's key bias, and a bias before a batch norm, have no gradient by their mathematics.
    still = [name for name, value in states["before"].items() if torch.equal(value, states["after"][name])]
    assert [name for name in still if not name.endswith("bias")] == []
    losses = curves_of(directory, f"straight-{stage}")["loss"]
    assert losses[TOTAL_STEPS] < losses[LOG_EVERY]


@each_stage
def test_zero_stages_and_precisions_train_the_same_model(directory: Path, stage: int) -> None:
    expected = curves_of(directory, "straight-0")["loss"]
    assert curves_of(directory, f"straight-{stage}")["loss"] == pytest.approx(expected, rel=1e-5)
    half = curves_of(directory, f"bf16-{stage}")["loss"]
    assert half == pytest.approx(expected, rel=0.1)
    assert half != pytest.approx(expected, rel=1e-5)  # it did compute in half precision
    # Whatever ZeRO made of them, every parameter is whole and in fp32.
    assert_bit_equal(result(directory, "straight", stage)["before"], result(directory, "straight", 0)["before"])
    state = result(directory, "bf16", stage)["after"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def test_the_journal_has_the_metrics_of_each_interval(directory: Path) -> None:
    metrics = curves_of(directory, "straight-2")
    assert {"loss", "contrastive", "logit_scale", "learning_rate", "gradient_norm", "samples_per_second"} <= set(
        metrics
    )
    assert all(norm > 0 for norm in metrics["gradient_norm"].values())
    assert all(0 < scale <= 2.72**MAX_LOGIT_SCALE for scale in metrics["logit_scale"].values())
    # Steps 5 and 6 make the line of step 6; 5 ends the epoch with a batch that is half padding.
    assert metrics["padding_waste"][LOG_EVERY] == 0
    assert metrics["padding_waste"][2 * LOG_EVERY] == pytest.approx(0.25)
    events = [line for line in journal_at(str(directory / "straight-2" / "journal.jsonl")) if "event" in line]
    assert [(line["step"], line["event"], line["epoch"], line["position"]) for line in events] == [
        (CHECKPOINT_EVERY, "checkpoint", 0, CHECKPOINT_EVERY * BATCH)
    ]
    assert "gradient_norm" not in curves_of(directory, "straight-0")  # DeepSpeed has none


def test_the_learning_rate_warms_up_and_decays(directory: Path) -> None:
    rates = curves_of(directory, "straight-2")["learning_rate"]
    assert rates[LOG_EVERY] == pytest.approx(0.01)
    assert list(rates.values()) == sorted(rates.values(), reverse=True)


@pytest.mark.parametrize("stage", DROPPING_STAGES)
def test_a_step_that_deepspeed_drops_counts_in_the_schedule(directory: Path, stage: int) -> None:
    straight, dropped = (curves_of(directory, f"{name}-{stage}") for name in ("straight", "dropped"))
    assert list(dropped["skipped_steps"].values()) == [1.0] * len(straight["loss"])
    assert dropped["learning_rate"] == straight["learning_rate"]


if __name__ == "__main__":
    main(straight, resumed, dropped, bf16)
