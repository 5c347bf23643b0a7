"""A training as plain data, which travels to other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.dataset.opened import open_dataset
from mmflow.learning.cached import CachedTeacher
from mmflow.learning.config import ObjectivesConfig
from mmflow.learning.distillation.config import DistillationLossesConfig, InitialiseConfig
from mmflow.learning.distillation.table import LIVE
from mmflow.learning.initialise import initialise
from mmflow.learning.learner import Learner, Ranks
from mmflow.learning.objectives.table import check
from mmflow.learning.outputs import masking_tokens
from mmflow.learning.rows import gather_rows, pass_on
from mmflow.learning.student import Student, Teacher
from mmflow.learning.tasks import TaskLearner
from mmflow.loading.batches import Reading, ViewSettings
from mmflow.loading.config import LoaderConfig
from mmflow.loading.loader import START, Loader, TaskLoader
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
class TrainingJob:
    """All that a rank needs to know."""

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
    checkpoints: str  # URI
    classes: tuple[str, ...] = ()  # labels or answers that targets are numbered by
    lineage: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None  # URI of the package that the model begins with
    lora: LoraConfig | None = None
    several: tuple[Task, ...] = ()  # in place of `loader` and `objectives`
    teachers: tuple[TeacherPackage, ...] = ()
    losses: DistillationLossesConfig | None = None
    initialise: InitialiseConfig | None = None  # by the first teacher
    stored_views: int = 0  # that the teachers' caches know; 0: they have none

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What is learnt: the stage itself is one task unless it has several."""
        return self.several or (Task(key=self.stage, loader=self.loader, objectives=self.objectives),)


def total_steps(tasks: Sequence[Task], dataset: str, training: TrainingConfig) -> int:
    """Steps of the whole training of a stage whose own dataset lies at a URI. An epoch has as many as an epoch of each
    task's data."""
    size = training.global_batch_size
    epoch = sum(steps_per_epoch(each.loader, open_dataset(each.dataset or dataset), size) for each in tasks)
    return training.epochs * epoch


@dataclass(frozen=True, kw_only=True)
class TeacherPackage:
    """Where a teacher lies, and its caches; plain data, so that it travels to other machines."""

    package: str  # URI
    weight: float = 1.0
    caches: tuple[str, ...] = ()  # URIs, one for each dataset of the stage; none: it teaches live


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
    """The teachers, loaded unless their caches are all that the losses ask for.

    `tokenizer`, `max_tokens` and `frames` are the student's, `datasets` the fingerprints of those it is trained on,
    `key` the recipe's, for errors. Raises RecipeError for a teacher of stills that would be shown clips, and as
    `load_package` and `CachedTeacher`.
    """
    live = any(name in LIVE for name in losses.named)
    teachers = []
    for each in packages:
        package = read_package(each.package)
        cached = CachedTeacher(each.caches, datasets, package.digest) if each.caches else None
        if cached is not None and not live:
            teachers.append(Teacher(weight=each.weight, cached=cached))
            continue
        loaded = load_package(package)
        if frames and loaded.config.video is None:
            raise RecipeError(f"{key}.loader.frames: {frames}, and the teacher {each.package} sees stills; set it to 0")
        reading = own_reading(package, tokenizer, max_tokens)
        teachers.append(Teacher(weight=each.weight, loaded=loaded, cached=cached, reading=reading))
    return tuple(teachers)


def own_reading(package: Package, tokenizer: Tokenizer, max_tokens: int) -> Reading | None:
    """How a teacher reads texts; None for one that reads the tokens of a student with this tokenizer and length."""
    theirs = read_tokenizer(read_vocabulary(package)[0])
    most = read_config(package).max_tokens
    return None if theirs.to_str() == tokenizer.to_str() and max_tokens <= most else Reading(theirs, most)


def views_of_teacher(views: ViewSettings, package: Package, tokenizer: Tokenizer) -> ViewSettings:
    """The student's views as a teacher sees them by itself: at its own size, and in its own words where it has others,
    of which none is dropped."""
    views = replace(views, image_pixels=read_config(package).image_pixels)
    reading = own_reading(package, tokenizer, views.max_tokens)
    if reading is None:
        return views
    augment = views.augment.model_copy(update={"token_dropout": 0.0})
    return replace(views, max_tokens=reading.max_tokens, augment=augment)


Learning = Learner | TaskLearner | Student


@dataclass(frozen=True)
class Built:
    """What is trained, the side of the pictures that it is shown, and what trains it."""

    learner: Learning
    image_pixels: int
    engine: Any
    begun: Start | None = None  # with the weights of a package


def build(job: TrainingJob, tokenizer: Tokenizer, steps: int) -> Built:
    """The model of a job as it begins, and an engine for so many steps. Collective."""
    learner, image_pixels = _learner(job, tokenizer)
    begun = None
    if job.start is not None:
        begun = start_from(f"{job.stage}.start", model_of(learner), read_package(job.start), job.classes)
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
    if not job.teachers or job.losses is None:
        return learner, job.model.image_pixels
    if job.initialise is not None:
        first = load_package(read_package(job.teachers[0].package)).model
        initialise(f"{job.stage}.initialise", model, first, job.initialise)
    teachers = open_teachers(
        job.stage,
        job.teachers,
        job.losses,
        tokenizer=tokenizer,
        max_tokens=job.model.max_tokens,
        frames=job.loader.frames,
        datasets=[reader.dataset.fingerprint for reader in open_readers(job.loader, open_dataset(job.dataset))],
    )
    student = Student(learner, teachers, job.losses, key=job.stage)
    return student, student.image_pixels


def open_source(
    job: TrainingJob,
    tokenizer: Tokenizer,
    device: torch.device,
    state: LoaderState,
    *,
    image_pixels: int,
    readings: tuple[Reading, ...] = (),
) -> Loader | TaskLoader:
    """This rank's batches from `state` on: pictures of `image_pixels`, texts also as the `readings` have them."""
    loaders = [
        _open(
            job,
            task,
            task.loader,
            tokenizer,
            device,
            global_batch_size=job.training.global_batch_size,
            image_pixels=image_pixels,
            stored_views=job.stored_views,
            readings=readings,
            state=state,
        )
        for task in job.tasks
    ]
    return TaskLoader(loaders, [each.weight for each in job.several], state) if job.several else loaders[0]


def open_validation(
    job: TrainingJob, tokenizer: Tokenizer, device: torch.device, total_steps: int
) -> Validation | None:
    """The validations of a training; None where the recipe asks for none."""
    config, kept = job.training.validation, job.training.checkpoints
    if config is None:
        return None
    step_size, micro = job.training.global_batch_size, job.training.micro_batch_size
    size = config.batch_size or min(step_size, micro * job.training.least_workers if micro else step_size)
    size = min(size, config.max_samples)  # what is beyond is padding
    held_out = [
        HeldOut(
            task=number,
            name=task.name,
            share=task.weight,
            objectives=task.objectives,
            loader=_open(
                job,
                task,
                held_out_loader(task.loader, config.split),
                tokenizer,
                device,
                global_batch_size=min(size, open_dataset(task.dataset or job.dataset).samples(config.split)),
                image_pixels=job.model.image_pixels,
            ),
        )
        for number, task in enumerate(job.tasks)
    ]
    best = Best(kept.best_metric, highest=kept.best_is_highest, least_gain=config.least_gain, patience=config.patience)
    return Validation(
        config,
        held_out,
        best,
        keeps_best=kept.keep_best > 0,
        averaged=job.training.ema_decay is not None,
        last_step=total_steps,
    )


def _open(
    job: TrainingJob,
    task: Task,
    config: LoaderConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    global_batch_size: int,
    image_pixels: int,
    stored_views: int = 0,
    readings: tuple[Reading, ...] = (),
    state: LoaderState = START,
) -> Loader:
    return open_loader(
        config,
        open_dataset(task.dataset or job.dataset),
        tokenizer,
        global_batch_size=global_batch_size,
        image_pixels=image_pixels,
        max_tokens=job.model.max_tokens,
        seed=job.seed,
        reads_text=bool(job.model.text or job.model.decoder or job.teachers),
        classes=job.classes,
        stored_views=stored_views,
        readings=readings,
        cores=job.training.cpus_per_worker,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        state=state,
    )
