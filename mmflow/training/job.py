"""A training as plain data, which travels to other machines, and what a rank builds from it: the model, its teachers,
the engine, and its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.dataset.opened import open_dataset
from mmflow.learning.cached_embeddings import CachedTeacher
from mmflow.learning.distillation import DistillationLossesConfig, InitialiseConfig
from mmflow.learning.learner import Learner
from mmflow.learning.objectives import check_objectives
from mmflow.learning.outputs import masking_tokens
from mmflow.learning.rows import all_ranks
from mmflow.learning.student import Student, Teacher, initialise
from mmflow.loading.batches import Reading, ViewSettings
from mmflow.loading.config import LoaderConfig
from mmflow.loading.loader import Loader, TaskLoader
from mmflow.loading.opening import held_out_loader, open_loader, open_readers, steps_per_epoch
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import read_tokenizer
from mmflow.models.config import LoraConfig, ModelConfig
from mmflow.models.lora import adapt
from mmflow.models.model import Model
from mmflow.models.model import build as build_model
from mmflow.models.package import (
    Package,
    Start,
    fresh_parts,
    load_package,
    read_config,
    read_package,
    read_vocabulary,
    start_from,
)
from mmflow.training.config import Task, TrainingConfig
from mmflow.training.engine import build_engine, compile_parts
from mmflow.training.validation import Best, HeldOut, Validation


@dataclass(frozen=True, kw_only=True)
class TeacherPackage:
    """A teacher's package and its caches, as plain data."""

    package: str  # URI
    weight: float = 1.0
    caches: tuple[str, ...] = ()  # URIs, one for each dataset of the stage; without them the teacher runs live


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """All that a rank needs to know."""

    stage: str  # the recipe's section, for errors
    dataset: str  # URI
    tokenizer_json: str
    model: ModelConfig
    tasks: tuple[Task, ...]
    training: TrainingConfig
    seed: int
    package: str  # URI, where rank 0 writes the trained model
    journal: str  # URI, where rank 0 writes its journal
    checkpoints: str  # URI
    classes: tuple[str, ...] = ()  # labels or answers, in the order of their numbers
    lineage: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None  # URI of the package that the model starts from
    lora: LoraConfig | None = None
    teachers: tuple[TeacherPackage, ...] = ()
    losses: DistillationLossesConfig | None = None
    initialise: InitialiseConfig | None = None  # from the first teacher
    stored_views: int = 0  # views in the teachers' caches; 0 without caches

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names before tasks' metrics; empty for a single task."""
        return tuple(task.name for task in self.tasks) if len(self.tasks) > 1 else ()


def total_steps(tasks: Sequence[Task], dataset: str, training: TrainingConfig) -> int:
    """Steps of a whole training on the dataset at a URI. An epoch is an epoch of each task's data."""
    size = training.global_batch_size
    epoch = sum(steps_per_epoch(task.loader, open_dataset(task.dataset or dataset), size) for task in tasks)
    return training.epochs * epoch


# --- the model, and what trains it ----------------------------------------------------------------------------------

Learning = Learner | Student


@dataclass(frozen=True)
class Built:
    """A job's module, which returns the loss of a batch, and the engine that trains it."""

    learner: Learning
    engine: Any
    begun: Start | None = None  # what the package that it starts from has given it

    @property
    def model(self) -> Model:
        """The model that learns."""
        return _model_of(self.learner)


def build(job: TrainingJob, tokenizer: Tokenizer, steps: int) -> Built:
    """A job's model before its first step, and an engine for so many steps. Collective."""
    learner = _learner(job, tokenizer)
    model, begun = _model_of(learner), None
    if job.start is not None:
        begun = start_from(f"{job.stage}.start", model, read_package(job.start), job.classes)
    if job.lora is not None:
        fresh = begun.fresh if begun is not None else fresh_parts(model, job.model)
        adapt(f"{job.stage}.lora", model, job.lora, fresh, job.seed)
    if job.training.compile:
        compile_parts(model)
    return Built(learner, build_engine(learner, job.training, steps), begun)


def _model_of(learner: Learning) -> Model:
    return (learner.learner if isinstance(learner, Student) else learner).model


def _learner(job: TrainingJob, tokenizer: Tokenizer) -> Learning:
    model = build_model(f"{job.stage}.model", job.model, tokenizer.get_vocab_size(), job.seed, len(job.classes))
    special = masking_tokens(tokenizer)
    for task in job.tasks:
        check_objectives(f"{task.key}.objectives", task.objectives, model.gives, special)
    objectives = [task.objectives for task in job.tasks]
    learner = Learner(model, job.model, objectives, special, seed=job.seed, ranks=all_ranks())
    if not job.teachers or job.losses is None:
        return learner
    if job.initialise is not None:
        first = load_package(read_package(job.teachers[0].package)).model
        initialise(f"{job.stage}.initialise", model, first, job.initialise)
    loader = job.tasks[0].loader
    teachers = open_teachers(
        job.stage,
        job.teachers,
        job.losses,
        tokenizer=tokenizer,
        max_tokens=job.model.max_tokens,
        frames=loader.frames,
        datasets=[reader.dataset.fingerprint for reader in open_readers(loader, open_dataset(job.dataset))],
    )
    return Student(learner, teachers, job.losses, key=job.stage)


def open_teachers(
    key: str,
    packages: Sequence[TeacherPackage],
    losses: DistillationLossesConfig,
    *,
    tokenizer: Tokenizer,
    max_tokens: int,
    frames: int,
    datasets: Sequence[str],
) -> tuple[Teacher, ...]:
    """The teachers, loaded unless the losses can be computed from their caches alone.

    `tokenizer`, `max_tokens` and `frames` are the student's, `datasets` the fingerprints of its datasets, `key` the
    recipe's, for errors. Raises RecipeError where a teacher of stills would be shown clips, and what `load_package` and
    `CachedTeacher` raise.
    """
    live = any(loss.NEEDS_TEACHER_MODEL for loss in losses.named.values())
    teachers = []
    for teacher in packages:
        package = read_package(teacher.package)
        cached = CachedTeacher(teacher.caches, datasets, package.digest) if teacher.caches else None
        if cached is not None and not live:
            teachers.append(Teacher(weight=teacher.weight, cached=cached))
            continue
        loaded = load_package(package)
        if frames and loaded.config.video is None:
            raise RecipeError(
                f"{key}.loader.frames: {frames}, but the teacher {teacher.package} reads stills; set it to 0"
            )
        reading = _own_reading(package, tokenizer, max_tokens)
        teachers.append(Teacher(weight=teacher.weight, loaded=loaded, cached=cached, reading=reading))
    return tuple(teachers)


def _own_reading(package: Package, tokenizer: Tokenizer, max_tokens: int) -> Reading | None:
    """How a teacher reads texts; None where it reads the tokens of a student with this tokenizer and length."""
    own, own_max_tokens = read_tokenizer(read_vocabulary(package)[0]), read_config(package).max_tokens
    if own.to_str() == tokenizer.to_str() and max_tokens <= own_max_tokens:
        return None
    return Reading(own, own_max_tokens)


def views_of_teacher(views: ViewSettings, package: Package, tokenizer: Tokenizer) -> ViewSettings:
    """The student's views as a teacher alone sees them: at its own image size, and with its own tokenizer where it has
    another, without dropping tokens."""
    views = replace(views, image_pixels=read_config(package).image_pixels)
    reading = _own_reading(package, tokenizer, views.max_tokens)
    if reading is None:
        return views
    augment = views.augment.model_copy(update={"token_dropout": 0.0})
    return replace(views, max_tokens=reading.max_tokens, augment=augment)


# --- batches --------------------------------------------------------------------------------------------------------


def open_source(
    job: TrainingJob, tokenizer: Tokenizer, device: torch.device, state: LoaderState, learner: Learning
) -> Loader | TaskLoader:
    """This rank's batches from `state` on, as the learner's model and teachers read them."""
    settings: dict[str, Any] = {
        "global_batch_size": job.training.global_batch_size,
        "image_pixels": job.model.image_pixels,
        "stored_views": job.stored_views,
        "state": state,
    }
    if isinstance(learner, Student):
        settings |= {"image_pixels": learner.image_pixels, "readings": learner.readings}
    loaders = [_open(job, task, task.loader, tokenizer, device, **settings) for task in job.tasks]
    return TaskLoader(loaders, [task.weight for task in job.tasks], state) if len(loaders) > 1 else loaders[0]


def open_validation(
    job: TrainingJob, tokenizer: Tokenizer, device: torch.device, total_steps: int
) -> Validation | None:
    """A training's validations; None where the recipe asks for none."""
    config = job.training.validation
    if config is None:
        return None
    step_size, micro = job.training.global_batch_size, job.training.micro_batch_size
    size = config.batch_size or min(step_size, micro * job.training.least_workers if micro else step_size)
    size = min(size, config.max_samples)  # rows past the last sample would be padding
    held_out = []
    for number, task in enumerate(job.tasks):
        samples = open_dataset(task.dataset or job.dataset).samples(config.split)
        loader = _open(
            job,
            task,
            held_out_loader(task.loader, config.split),
            tokenizer,
            device,
            global_batch_size=min(size, samples),
            image_pixels=job.model.image_pixels,
        )
        held_out.append(
            HeldOut(task=number, name=task.name, share=task.weight, objectives=task.objectives, loader=loader)
        )
    return Validation(
        config=config,
        held_out=held_out,
        best=Best(job.training.checkpoints, config),
        keeps_best=job.training.checkpoints.keep_best > 0,
        averaged=job.training.ema_decay is not None,
        last_step=total_steps,
    )


def _open(
    job: TrainingJob, task: Task, config: LoaderConfig, tokenizer: Tokenizer, device: torch.device, **settings: Any
) -> Loader:
    return open_loader(
        config,
        open_dataset(task.dataset or job.dataset),
        tokenizer,
        max_tokens=job.model.max_tokens,
        seed=job.seed,
        reads_text=bool(job.model.text or job.model.decoder or job.teachers),
        classes=job.classes,
        cores=job.training.cpus_per_worker,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        **settings,
    )
