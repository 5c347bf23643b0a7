"""A process that trains the smallest dual encoder with DeepSpeed: `python -m tests.training.tiny_training ACT … PATH`.

DeepSpeed's import and set-up cost seconds, so each act goes through all its cases and leaves results to assert on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.core.errors import CorruptArtifactError, TrainingError
from mmflow.learning.config import ObjectivesConfig
from mmflow.learning.learner import Learner, Parts
from mmflow.learning.outputs import MaskingTokens
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training.checkpoints import Checkpoints
from mmflow.training.config import CheckpointsConfig, GuardsConfig, OptimizerConfig, TrainingConfig
from mmflow.training.engine import build_engine, prepare_deepspeed, whole_state
from mmflow.training.guards import Guards
from mmflow.training.journal import Journal, read_journal
from mmflow.training.loop import Due, Loop
from tests.tiny import SMALLEST_MODEL

ZERO_STAGES = (0, 1, 2, 3)
DROPPING_STAGES = (1, 2)  # ZeRO 3 looks in fp16 alone
TOTAL_STEPS, CHECKPOINT_EVERY, LOG_EVERY = 8, 4, 3
BATCH, STEPS_PER_EPOCH, VOCABULARY = 6, 5, 40
START = LoaderState()
STORE = "checkpoints"
DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights gone": lambda path: next(path.rglob("mp_rank_00_model_states.pt")).unlink(),
    "weights cut short": lambda path: cut(next(path.rglob("mp_rank_00_model_states.pt"))),
    "optimizer gone": lambda path: next(path.rglob("*optim_states.pt")).unlink(),
    "optimizer cut short": lambda path: cut(next(path.rglob("*optim_states.pt"))),
    "random state gone": lambda path: next(path.rglob("random-0.pt")).unlink(),
    "a bit of the optimizer turned": lambda path: turn(next(path.rglob("*optim_states.pt"))),
}

# Dropout, so that the random state matters; batch norm, so that buffers do.
TEXT = SMALLEST_MODEL["text"]
MODEL = ModelConfig.model_validate(
    {**SMALLEST_MODEL, "text": {**TEXT, "options": {**TEXT["options"], "hidden_dropout_prob": 0.3}}}
)


class Poisoned(Learner):
    """A learner whose loss, or the gradient of it, is no number at one of its steps."""

    poison: str | None = None

    def forward(self, batch: Batch, step: int, *more: Any, **options: Any) -> tuple[Tensor, Parts]:
        loss, parts = super().forward(batch, step, *more, **options)
        if self.poison == "loss" and step == 2:
            loss = loss * float("nan")
        if self.poison == "gradient" and step == 3:
            loss = loss + (loss - loss).sqrt()  # value 0, slope infinite
        return loss, parts


def learner() -> Poisoned:
    model = build("pretrain.model", MODEL, VOCABULARY, seed=1)
    return Poisoned(model, MODEL, ObjectivesConfig(), MaskingTokens(None, (), VOCABULARY), seed=1)


def engine_of(zero_stage: int, precision: str = "fp32", poison: str | None = None) -> Any:
    module = learner()
    module.poison = poison
    engine = build_engine(
        module,
        TrainingConfig(
            optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=3),
            zero_stage=zero_stage,
            precision=precision,
            global_batch_size=BATCH,
        ),
        TOTAL_STEPS,
    )
    torch.manual_seed(5)
    return engine


def source(state: LoaderState, seen: list[LoaderState]) -> Iterator[Batch]:
    """Endless batches that follow from their position alone; the last of an epoch is half padding."""
    while True:
        random = torch.Generator().manual_seed(1000 * state.epoch + state.position)
        step = state.position // BATCH + 1
        last = step == STEPS_PER_EPOCH
        state = LoaderState(state.epoch + 1) if last else LoaderState(state.epoch, step * BATCH)
        seen.append(state)
        yield Batch(
            keys=tuple(map(str, range(BATCH))),
            pixels=torch.randint(0, 256, (BATCH, 3, 16, 16), generator=random, dtype=torch.uint8),
            token_ids=torch.randint(0, VOCABULARY, (BATCH, 7), generator=random),
            token_mask=torch.ones(BATCH, 7, dtype=torch.int64),
            real=torch.arange(BATCH) < (BATCH // 2 if last else BATCH),
            state=state,
        )


def checkpoints_in(directory: Path, journal: Journal | None = None) -> Checkpoints:
    return Checkpoints(str(directory / STORE), CheckpointsConfig(), journal or Journal())


def run(
    engine: Any,
    directory: Path,
    *,
    step: int = 0,
    state: LoaderState = START,
    log_every: int = LOG_EVERY,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> list[Any]:
    """Train to the last step; the loader's states that were passed."""
    seen: list[LoaderState] = []
    journal, checkpoints = Journal(directory / "journal.jsonl"), checkpoints_in(directory)
    try:
        loop = Loop(
            engine=engine,
            total_steps=TOTAL_STEPS,
            log_every=log_every,
            due=Due(every_steps=checkpoint_every, every_minutes=None),
            save=lambda step, state, metrics, reason: checkpoints.save(engine, step, state, metrics),
            guards=Guards(GuardsConfig()),
            journal=journal,
            shard_name=lambda dataset, shard: f"{shard:05d}",
        )
        loop.run(source(state, seen), first_step=step, state=state)
        checkpoints.finish(TOTAL_STEPS)
    finally:
        journal.close()
    return [(each.epoch, each.position) for each in seen]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- the acts -------------------------------------------------------------------------------------------------------


def straight(directory: Path) -> None:
    """Eight steps at each ZeRO stage, a checkpoint on the way."""
    for zero_stage in ZERO_STAGES:
        here = directory / f"straight-{zero_stage}"
        engine = engine_of(zero_stage)
        before = whole_state(engine.module)
        seen = run(engine, here)
        torch.save({"before": before, "after": whole_state(engine.module), "seen": seen}, here / "result.pt")


def resumed(directory: Path) -> None:
    """From the fourth step's checkpoint on, in a process that knows nothing else."""
    for zero_stage in ZERO_STAGES:
        here = directory / f"resumed-{zero_stage}"
        engine = engine_of(zero_stage)
        torch.manual_seed(99)  # what the checkpoint says must win over what the process happens to hold
        checkpoints = checkpoints_in(directory / f"straight-{zero_stage}")
        saved = next(checkpoints.newest())
        state = checkpoints.load(engine, saved, seed=1)
        assert state is not None
        seen = run(engine, here, step=saved.step, state=state)
        result = {
            "after": whole_state(engine.module),
            "seen": seen,
            "step": saved.step,
            "state": (state.epoch, state.position),
        }
        torch.save(result, here / "result.pt")


def damaged(directory: Path) -> None:
    """What is said of stores whose only checkpoint is damaged."""
    found = {}
    for name in DAMAGES:
        journal = directory / name / "journal.jsonl"
        try:
            list(checkpoints_in(directory / name, Journal(journal)).newest())
        except CorruptArtifactError as error:
            found[name] = [
                *(f"{line['event']} {line['step']}: {line['reason']}" for line in read_journal(journal)),
                str(error),
            ]
    torch.save(found, directory / "said.pt")


def poisoned(directory: Path) -> None:
    """Losses and gradients that are not numbers, from the second step on: what is raised, and what was saved."""
    found = {}
    for zero_stage in ZERO_STAGES:
        for kind in ("loss", "gradient"):
            here = directory / f"{kind}-{zero_stage}"
            engine = engine_of(zero_stage, poison=kind)
            try:
                run(engine, here, log_every=100, checkpoint_every=3)
                said = "trained to the end"
            except TrainingError as error:
                said = str(error)
            found[kind, zero_stage] = (said, [path.name for path in (here / STORE).glob("step-*")])
    torch.save(found, directory / "found.pt")


def dropped(directory: Path) -> None:
    """A step that DeepSpeed drops for its gradients, as it does in fp16, which is for accelerators."""
    for zero_stage in DROPPING_STAGES:
        engine = engine_of(zero_stage, poison="gradient")
        engine.optimizer.check_grad_overflow = True
        run(engine, directory / f"dropped-{zero_stage}")


def bf16(directory: Path) -> None:
    """Half precision at each ZeRO stage."""
    for zero_stage in ZERO_STAGES:
        here = directory / f"bf16-{zero_stage}"
        engine = engine_of(zero_stage, "bf16")
        run(engine, here)
        torch.save({"after": whole_state(engine.module)}, here / "result.pt")


def main() -> None:
    *acts, directory = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_deepspeed()
    os.environ["LOCAL_RANK"] = "0"  # as every launcher sets it; DeepSpeed insists
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for act in acts:
        {each.__name__: each for each in (straight, resumed, damaged, poisoned, dropped, bf16)}[act](Path(directory))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
