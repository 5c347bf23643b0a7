"""A rank that goes through whole trainings, and meets what it is told to: `python -m tests.training.faulty_ranks RANK
RANKS DIRECTORY PLAN`, the plan as JSON: a list of `Training`s' fields.

Importing DeepSpeed costs seconds, so one process goes through several.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.errors import MmflowError
from mmflow.loading.batches import Batch
from mmflow.loading.config import LoaderConfig
from mmflow.models.config import ModelConfig
from mmflow.objectives.config import ObjectivesConfig
from mmflow.objectives.learner import Learner, Parts
from mmflow.training import job as training_job
from mmflow.training.config import TrainingConfig
from mmflow.training.job import TrainingJob, run_rank
from mmflow.training.store import saved_checkpoints

BATCH, EPOCHS, EVERY = 5, 2, 4  # a batch that neither two nor three ranks divide
VICTIM = "key-11"  # of shard 00001

# No dropout and no batch norm: what other ranks draw, and statistics of other slices, are other numbers.
OPTIONS = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODEL = ModelConfig.model_validate(
    {
        "image": {"type": "vit", "options": {**OPTIONS, "patch_size": 8}},
        "text": {"type": "bert", "options": {**OPTIONS, "max_position_embeddings": 16}},
        "embedding_width": 6,
        "image_pixels": 16,
        "max_tokens": 8,
        "vocabulary_size": 64,
    }
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, and the fault in it."""

    name: str  # its directory
    dataset: str
    tokenizer: str  # a file
    training: dict[str, Any] = field(default_factory=dict)
    checkpoints: str | None = None  # elsewhere than in its directory
    die: tuple[int, int] | None = None  # the rank, and the step at which it kills itself
    die_while_saving: tuple[int, int] | None = None  # the rank, and which rename of its files it does not survive
    sleep: tuple[int, int] | None = None  # the rank, and the step before which it sleeps
    poison: str | None = None  # "loss", "gradient" or "spike", of every batch with the victim in it


class Poisoned(Learner):
    """A learner to whom one sample gives no number, or far too large a one."""

    poison: str | None = None

    def forward(self, batch: Batch, step: int, *more: Any) -> tuple[Tensor, Parts]:
        loss, parts = super().forward(batch, step, *more)
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
        model=MODEL,
        loader=LoaderConfig(),
        objectives=ObjectivesConfig(),
        training=TrainingConfig.model_validate(fields | plan.training),
        seed=3,
        package=str(here / "package"),
        journal=str(here / "journal.jsonl"),
        checkpoints=plan.checkpoints or str(here / "checkpoints"),
    )


def run(plan: Training, directory: Path) -> str:
    """What the training ended with: "", or the error."""
    here = directory / plan.name
    here.mkdir(exist_ok=True)
    Poisoned.poison = plan.poison
    with (here / f"seen-{dist.get_rank()}.jsonl").open("a", buffering=1) as seen:
        job = job_of(plan, directory)
        training_job.train = watched(plan, seen.write, job.checkpoints)
        os.replace = dying_replace(plan)
        try:
            run_rank(job)
        except MmflowError as error:
            return str(error)
        finally:
            os.replace, training_job.train = REPLACE, TRAIN
    return ""


TRAIN, REPLACE = training_job.train, os.replace


def watched(plan: Training, write: Callable[[str], Any], checkpoints: str) -> Callable[..., None]:
    """The loop over batches that are written down, and in which this rank meets its fate."""

    def train(engine: Any, source: Iterator[Batch], *, first_step: int, **settings: Any) -> None:
        def batches() -> Iterator[Batch]:
            for step, batch in enumerate(source, first_step + 1):
                if plan.die == (dist.get_rank(), step):
                    wait_for_checkpoint(checkpoints, (step - 1) // EVERY * EVERY)
                    os.kill(os.getpid(), signal.SIGKILL)
                if plan.sleep == (dist.get_rank(), step):
                    time.sleep(3600)
                keys = [key for key, real in zip(batch.keys, batch.real.tolist(), strict=True) if real]
                write(json.dumps({"step": step, "keys": keys}) + "\n")
                yield batch

        TRAIN(engine, batches(), first_step=first_step, **settings)

    return train


def wait_for_checkpoint(checkpoints: str, step: int) -> None:
    """It is brought to its place while the training goes on."""
    for _ in range(1000):
        if any(each.step == step for each in saved_checkpoints(checkpoints)):
            return
        time.sleep(0.05)


def dying_replace(plan: Training) -> Callable[..., None]:
    """`os.replace` that this rank does not survive at some call."""
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
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    training_job.Learner = Poisoned
    from mmflow.training.engine import prepare_deepspeed

    prepare_deepspeed()
    timeout = datetime.timedelta(seconds=float(os.environ["EXCHANGE_SECONDS"]))
    store = dist.FileStore(str(directory / os.environ["RENDEZVOUS"]), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    for fields in plans:
        pairs = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        said = run(Training(**pairs), directory)
        (directory / fields["name"] / f"said-{rank}.txt").write_text(said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
