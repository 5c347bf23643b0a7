"""A rank that runs whole trainings with faults: `python -m tests.training.faulty_ranks RANK RANKS DIRECTORY PLAN`. The
plan is a JSON list with the fields of each `Training`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmflow.core.errors import MmflowError
from mmflow.core.storage import write_json
from mmflow.learning.learner import Learner, Parts
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.loading.batches import Batch
from mmflow.loading.config import LoaderConfig
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.training import job as training_job
from mmflow.training.checkpoint_store import saved_checkpoints
from mmflow.training.config import Task, TrainingConfig
from mmflow.training.job import TrainingJob
from mmflow.training.loop import TrainingLoop
from mmflow.training.rank import run_rank
from tests.tiny import SMALLEST_MODEL
from tests.training.ranks import begin_rank, dual_encoder, transformer

BATCH, EPOCHS, EVERY = 5, 2, 4  # a batch that neither two nor three ranks divide
VICTIM = "key-11"  # of shard 00001

# No dropout and no batch norm: other ranks would draw other numbers, and see statistics of other slices.
OPTIONS = transformer()
MODEL = dual_encoder(OPTIONS, vocabulary_size=64)

# With both, and a matrix that ZeRO-3 partitions.
WIDE = transformer(320, intermediate=320) | {"hidden_dropout_prob": 0.3, "max_position_embeddings": 16}
UNSTEADY = ModelConfig.model_validate(SMALLEST_MODEL | {"text": {"type": "bert", "options": WIDE}})


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, and the fault in it."""

    name: str  # its directory
    dataset: str
    tokenizer: str  # a file
    tasks: tuple[str, ...] = ()  # names of several equal tasks
    unsteady: bool = False  # a model whose random state and batches' statistics matter
    training: dict[str, Any] = field(default_factory=dict)
    checkpoints: str | None = None  # elsewhere than in its directory
    die: tuple[int, int] | None = None  # the rank, and the step at which it kills itself
    die_while_saving: tuple[int, int] | None = None  # the rank, and the number of the file rename at which it dies
    sleep: tuple[int, int] | None = None  # the rank, and the step before which it sleeps
    halts: tuple[int, ...] = ()  # steps before which all ranks wait once, until they are released or killed
    poison: str | None = None  # "loss", "gradient" or "spike", of every batch with the victim in it


class Poisoned(Learner):
    """A learner with one sample that makes the loss or gradient not finite, or the loss far too large."""

    poison: str | None = None

    def forward(self, batch: Batch, step: int, *more: Any, **options: Any) -> tuple[Tensor, Parts]:
        loss, parts = super().forward(batch, step, *more, **options)
        if VICTIM in batch.keys:
            if self.poison == "loss":
                loss = loss * float("nan")
            elif self.poison == "gradient":
                loss = loss + (loss - loss).sqrt()  # value 0, slope infinite
            elif self.poison == "spike":
                loss = loss * 1000
        return loss, parts


def job_of(plan: Training, directory: Path) -> TrainingJob:
    here = directory / plan.name
    fields = {
        "epochs": EPOCHS,
        "global_batch_size": BATCH,
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 2},
        "checkpoint_every_steps": EVERY,
        "log_every_steps": 3,
    }
    return TrainingJob(
        stage="pretrain",
        dataset=plan.dataset,
        tokenizer_json=Path(plan.tokenizer).read_text(),
        model=UNSTEADY if plan.unsteady else MODEL,
        tasks=tuple(
            Task(
                key=f"pretrain.tasks.{number}" if plan.tasks else "pretrain",
                name=name,
                loader=LoaderConfig(),
                objectives=ObjectivesConfig(),
            )
            for number, name in enumerate(plan.tasks or ("",))
        ),
        training=TrainingConfig.model_validate(fields | plan.training),
        seed=3,
        package=str(here / "package"),
        journal=str(here / "journal.jsonl"),
        checkpoints=plan.checkpoints or str(here / "checkpoints"),
    )


def run(plan: Training, directory: Path, preempted: Callable[[], bool] = lambda: False) -> None:
    """Run the training with its fault. Raises what the training raises."""
    here = directory / plan.name
    Poisoned.poison = plan.poison
    with (here / f"seen-{dist.get_rank()}.jsonl").open("a", buffering=1) as seen:
        job = job_of(plan, directory)
        TrainingLoop.run = watched(plan, job, here, seen.write)  # type: ignore[method-assign]
        os.replace = dying_replace(plan)
        try:
            run_rank(job, preempted)
        finally:
            os.replace, TrainingLoop.run = REPLACE, RUN  # type: ignore[method-assign]


RUN, REPLACE = TrainingLoop.run, os.replace


def watched(plan: Training, job: TrainingJob, here: Path, write: Callable[[str], Any]) -> Callable[..., int]:
    """`TrainingLoop.run` that records the batches and has this rank's fault."""
    halts = [step for step in plan.halts if not any(here.glob(halted(step, "*")))]

    def run(loop: TrainingLoop, source: Iterator[Batch], *, first_step: int, state: LoaderState) -> int:
        def batches() -> Iterator[Batch]:
            for step, batch in enumerate(source, first_step + 1):
                if plan.die == (dist.get_rank(), step):
                    wait_for_checkpoint(job, step)
                    os.kill(os.getpid(), signal.SIGKILL)
                if plan.sleep == (dist.get_rank(), step):
                    time.sleep(3600)
                if step in halts:
                    wait_for_checkpoint(job, step)
                    halt(here, step)
                keys = [key for key, real in zip(batch.keys, batch.real.tolist(), strict=True) if real]
                write(json.dumps({"step": step, "keys": keys}) + "\n")
                yield batch

        return RUN(loop, batches(), first_step=first_step, state=state)

    return run


def halted(step: int, rank: int | str) -> str:
    """The file in which a rank says that it has reached a step."""
    return f"halted-{step}-{rank}.json"


def let_go(step: int) -> str:
    """The file that lets all ranks continue."""
    return f"let-go-{step}"


def halt(here: Path, step: int) -> None:
    """Say which process has reached a step, and wait."""
    write_json(str(here / halted(step, dist.get_rank())), {"process": os.getpid(), "raylet": os.getppid()})
    while not (here / let_go(step)).exists():
        time.sleep(0.02)


def wait_for_checkpoint(job: TrainingJob, step: int) -> None:
    """Wait for the last checkpoint before a step. It is published in the background."""
    every = job.training.checkpoint_every_steps
    last = (step - 1) // every * every
    for _ in range(1000):
        if last == 0 or any(saved.step == last for saved in saved_checkpoints(job.checkpoints)):
            return
        time.sleep(0.05)


def dying_replace(plan: Training) -> Callable[..., None]:
    """`os.replace` that kills this rank at one of its calls."""
    calls = 0

    def replace(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if plan.die_while_saving == (dist.get_rank(), calls):
            os.kill(os.getpid(), signal.SIGKILL)
        REPLACE(*arguments, **options)

    return replace


def main() -> None:
    rank, num_ranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    plans: list[Mapping[str, Any]] = json.loads(sys.argv[4])
    training_job.Learner = Poisoned
    begin_rank(rank, num_ranks, directory / os.environ["RENDEZVOUS"], float(os.environ["EXCHANGE_SECONDS"]))
    for fields in plans:
        pairs = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        (directory / fields["name"]).mkdir(exist_ok=True)
        message = directory / fields["name"] / f"error-{rank}.txt"
        try:
            run(Training(**pairs), directory)
            message.write_text("")
        except MmflowError as error:
            message.write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
