"""One rank of a training, whoever started it: Ray Train, torchrun, or a plain process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.artifacts import local_path, write_bytes
from mmflow.distillation.config import LessonsConfig
from mmflow.distillation.student import Student
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import open_loader, steps_per_epoch
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import read_tokenizer
from mmflow.models.config import ModelConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.marks import with_marks
from mmflow.models.model import Model, build
from mmflow.models.package import load_package, portable, read_package, write_package
from mmflow.objectives.config import ObjectivesConfig
from mmflow.objectives.learner import Learner, Ranks
from mmflow.objectives.objectives import check
from mmflow.objectives.outputs import masking_tokens
from mmflow.shards.dataset import Dataset, open_dataset
from mmflow.training.checkpoints import read_checkpoint, write_checkpoint
from mmflow.training.collectives import average_buffers, gather_rows, pass_on
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import build_engine, compile_parts, prepare_deepspeed, whole_state
from mmflow.training.loop import train
from mmflow.training.telemetry import Journal


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """All that a rank needs to know; plain data, so that it travels to other machines."""

    stage: str  # the recipe's section, for errors
    dataset: str  # URI
    tokenizer_json: str
    model: ModelConfig
    loader: LoaderConfig
    objectives: ObjectivesConfig
    training: TrainingConfig
    seed: int
    package: str  # URI, where rank 0 writes the trained model
    journal: str  # URI, where rank 0 writes its telemetry
    classes: tuple[str, ...] = ()  # labels or answers that targets are numbered by
    lineage: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None  # URI of a package
    lessons: LessonsConfig | None = None


class Host(Protocol):
    """What starts a rank also keeps its checkpoints."""

    def restore(self) -> contextlib.AbstractContextManager[Path | None]:
        """The merged directory of the last checkpoint, or None for a fresh start."""

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Have every rank's `write` fill a directory, merge and publish them. Every rank calls it."""


def total_steps(loader: LoaderConfig, dataset: Dataset, training: TrainingConfig) -> int:
    """Steps of the whole training."""
    return training.epochs * steps_per_epoch(loader, dataset, training.global_batch_size)


def run_rank(job: TrainingJob, host: Host) -> None:
    """Train to the last step, from the last checkpoint where there is one, and write the package. Collective."""
    prepare_deepspeed()
    dataset = open_dataset(job.dataset)
    tokenizer = read_tokenizer(job.tokenizer_json)
    job = replace(job, model=with_marks(f"{job.stage}.model", job.model, tokenizer))
    steps = total_steps(job.loader, dataset, job.training)
    learner, image_pixels = _learner(job, tokenizer)
    if job.training.compile:
        compile_parts(_model(learner))
    engine = build_engine(
        learner,
        optimizer=job.training.optimizer,
        zero_stage=job.training.zero_stage,
        precision=job.training.precision,
        global_batch_size=job.training.global_batch_size,
        total_steps=steps,
        micro_batch_size=job.training.micro_batch_size,
        offload_optimizer=job.training.offload_optimizer,
        ema_decay=job.training.ema_decay,
    )
    # Dropout must differ between ranks, or every rank drops the same units.
    torch.manual_seed(job.seed * 1_000_003 + dist.get_rank())
    step, state = 0, LoaderState()
    with host.restore() as directory:
        if directory is not None:
            step, state = read_checkpoint(engine, directory)
    loader = open_loader(
        job.loader,
        dataset,
        tokenizer,
        global_batch_size=job.training.global_batch_size,
        image_pixels=image_pixels,
        max_tokens=job.model.max_tokens,
        seed=job.seed,
        reads_text=any(part is not None for part in (job.model.text, job.model.decoder, job.teacher)),
        classes=job.classes,
        cores=job.training.cpus_per_worker,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=engine.device,
        state=state,
    )
    with _journal(job.journal) as (journal, flush):
        if journal:
            journal.event(step, "started", epoch=state.epoch, position=state.position, workers=dist.get_world_size())

        def save(step: int, state: LoaderState) -> None:
            host.save(step, partial(write_checkpoint, engine, step=step, state=state))
            flush()

        with contextlib.closing(iter(loader)) as ready:
            train(
                engine,
                ready,
                first_step=step,
                total_steps=steps,
                log_every=job.training.log_every_steps,
                checkpoint_every=job.training.checkpoint_every_steps,
                save=save,
                journal=journal,
            )
        _write(job, learner, averaged_by=engine if job.training.ema_decay is not None else None)
        flush()


def _model(learner: Learner | Student) -> Model:
    return (learner.learner if isinstance(learner, Student) else learner).model


def _write(job: TrainingJob, learner: Learner | Student, averaged_by: Any) -> None:
    average_buffers(learner)
    model = _model(learner)
    state = whole_state(model, averaged_by)
    if dist.get_rank() == 0:
        write_package(
            job.package,
            state=state,
            config=portable(job.model, model),
            tokenizer_json=job.tokenizer_json,
            parameters=parameter_count(model),
            lineage=job.lineage,
            classes=job.classes,
        )
    dist.barrier()  # no rank leaves before the package is whole


@contextlib.contextmanager
def _journal(uri: str) -> Iterator[tuple[Journal | None, Callable[[], None]]]:
    """Rank 0's journal, and how to bring it to a workspace that cannot be appended to (an object store)."""
    if dist.get_rank() != 0:
        yield None, lambda: None
        return
    path = local_path(uri)
    with tempfile.TemporaryDirectory() as scratch:
        here = path or Path(scratch) / "journal.jsonl"
        journal = Journal(here)
        try:
            yield journal, (lambda: None) if path else (lambda: write_bytes(uri, here.read_bytes()))
        finally:
            journal.close()


def _learner(job: TrainingJob, tokenizer: Tokenizer) -> tuple[Learner | Student, int]:
    """What is trained, and the side of the pictures that it is shown."""
    model = build(f"{job.stage}.model", job.model, tokenizer.get_vocab_size(), job.seed, len(job.classes))
    special = masking_tokens(tokenizer)
    check(f"{job.stage}.objectives", job.objectives, model, special)
    ranks = Ranks(dist.get_rank(), gather_rows, pass_on)
    learner = Learner(model, job.model, job.objectives, special, seed=job.seed, ranks=ranks)
    if job.teacher is None or job.lessons is None:
        return learner, job.model.image_pixels
    teacher = load_package(read_package(job.teacher))
    return Student(learner, teacher, job.lessons), max(job.model.image_pixels, teacher.config.image_pixels)
