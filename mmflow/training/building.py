"""What a job trains: the model, what it learns and of whom, and the engine that descends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.dataset.opened import open_dataset
from mmflow.learning.initialise import initialise
from mmflow.learning.learner import Learner, Ranks
from mmflow.learning.objectives.table import check
from mmflow.learning.outputs import masking_tokens
from mmflow.learning.student import Student
from mmflow.learning.tasks import TaskLearner
from mmflow.loading.opening import open_readers
from mmflow.models.lora import adapt
from mmflow.models.model import Model
from mmflow.models.model import build as build_model
from mmflow.models.package import load_package, read_package
from mmflow.models.start import Begun, begin, fresh_parts
from mmflow.training.collectives import gather_rows, pass_on
from mmflow.training.engine import build_engine, compile_parts
from mmflow.training.job import TrainingJob
from mmflow.training.teachers import open_teachers

Learning = Learner | TaskLearner | Student


@dataclass(frozen=True)
class Built:
    """What is trained, the side of the pictures that it is shown, and what trains it."""

    learner: Learning
    image_pixels: int
    engine: Any
    begun: Begun | None = None  # with the weights of a package


def build(job: TrainingJob, tokenizer: Tokenizer, steps: int) -> Built:
    """The model of a job as it begins, and an engine for so many steps. Collective."""
    learner, image_pixels = _learner(job, tokenizer)
    begun = None
    if job.start is not None:
        begun = begin(f"{job.stage}.start", model_of(learner), read_package(job.start), job.classes)
    if job.lora is not None:
        fresh = begun.fresh if begun is not None else fresh_parts(model_of(learner), job.model)
        adapt(f"{job.stage}.lora", model_of(learner), job.lora, fresh, job.seed)
    if job.training.compile:
        compile_parts(model_of(learner))
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
    return Built(learner, image_pixels, engine, begun)


def model_of(learner: Learning) -> Model:
    """The model that learns."""
    return (learner.learner if isinstance(learner, Student) else learner).model


def _learner(job: TrainingJob, tokenizer: Tokenizer) -> tuple[Learning, int]:
    """What is trained, and the side of the pictures that it is shown."""
    model = build_model(f"{job.stage}.model", job.model, tokenizer.get_vocab_size(), job.seed, len(job.classes))
    special = masking_tokens(tokenizer)
    for task in job.tasks:
        check(f"{task.key}.objectives", task.objectives, model.gives, special)
    ranks = Ranks(dist.get_rank(), gather_rows, pass_on)
    learners = [Learner(model, job.model, each.objectives, special, seed=job.seed, ranks=ranks) for each in job.tasks]
    if job.several:
        return TaskLearner(learners), job.model.image_pixels
    (learner,) = learners
    if not job.teachers or job.lessons is None:
        return learner, job.model.image_pixels
    if job.initialise is not None:
        first = load_package(read_package(job.teachers[0].package)).model
        initialise(f"{job.stage}.initialise", model, first, job.initialise)
    teachers = open_teachers(
        job.stage,
        job.teachers,
        job.lessons,
        tokenizer=tokenizer,
        max_tokens=job.model.max_tokens,
        frames=job.loader.frames,
        datasets=[reader.dataset.fingerprint for reader in open_readers(job.loader, open_dataset(job.dataset))],
    )
    student = Student(learner, teachers, job.lessons, key=job.stage)
    return student, student.image_pixels
