"""One rank of a training, whoever started it: Ray Train, torchrun, or a plain process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.artifacts import join, local_path, read_json, write_bytes, write_json
from mmflow.distillation.config import InitialiseConfig, LessonsConfig
from mmflow.distillation.initialise import initialise
from mmflow.distillation.student import Student
from mmflow.distillation.teachers import TeacherPackage, open_teachers
from mmflow.errors import CorruptArtifactError, MissingArtifactError, TrainingError
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import open_loader, open_readers, steps_per_epoch
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
from mmflow.training.checkpoints import Checkpoints
from mmflow.training.collectives import average_buffers, gather_rows, pass_on
from mmflow.training.config import TrainingConfig
from mmflow.training.due import PREEMPTION, Due
from mmflow.training.engine import build_engine, compile_parts, prepare_deepspeed, whole_state
from mmflow.training.guards import Guards, Rewind, Trouble
from mmflow.training.loop import train
from mmflow.training.pulse import Pulse
from mmflow.training.telemetry import Journal

GUARDS = "guards.json"  # beside the checkpoints


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
    checkpoints: str  # URI
    classes: tuple[str, ...] = ()  # labels or answers that targets are numbered by
    lineage: Mapping[str, Any] = field(default_factory=dict)
    teachers: tuple[TeacherPackage, ...] = ()
    lessons: LessonsConfig | None = None
    initialise: InitialiseConfig | None = None  # by the first teacher
    stored_views: int = 0  # that the teachers' caches know; 0: they have none


def total_steps(loader: LoaderConfig, dataset: Dataset, training: TrainingConfig) -> int:
    """Steps of the whole training."""
    return training.epochs * steps_per_epoch(loader, dataset, training.global_batch_size)


def run_rank(job: TrainingJob, preempted: Callable[[], bool] = lambda: False) -> None:
    """Train to the last step, from the newest checkpoint that can be read, and write the package. Collective.

    `preempted` says whether a machine that the ranks are on is to go; it is asked on all ranks at once.
    """
    prepare_deepspeed()
    tokenizer = read_tokenizer(job.tokenizer_json)
    job = replace(job, model=with_marks(f"{job.stage}.model", job.model, tokenizer))
    config = job.training
    guards = Guards(config.guards)
    with _journal(job.journal) as (journal, flush):

        def note(step: int, event: str, **details: Any) -> None:
            if journal:
                journal.event(step, event, **details)

        hung_after = 60 * config.guards.hung_after_minutes
        with Pulse(hung_after, lambda step, who: note(step, "hung", reason=who)) as pulse:
            due = Due(
                every_steps=config.checkpoint_every_steps,
                every_minutes=config.checkpoint_every_minutes,
                preempted=preempted,
            )
            checkpoints = Checkpoints(job.checkpoints, config.checkpoints, note)
            try:
                _recall(job.checkpoints, guards)
                trouble = _train(job, tokenizer, checkpoints, guards, due, pulse, journal, flush)
                while trouble is not None:
                    guards.rewound(trouble)
                    _keep(job.checkpoints, guards)
                    trouble = _train(job, tokenizer, checkpoints, guards, due, pulse, journal, flush, after=trouble)
            except RuntimeError as error:
                if not _is_of_an_exchange(error):
                    raise
                raise TrainingError(f"{' '.join(str(error).split())[:200]}; {pulse.missing()}") from error
        flush()


def _train(
    job: TrainingJob,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    guards: Guards,
    due: Due,
    pulse: Pulse,
    journal: Journal | None,
    flush: Callable[[], None],
    after: Trouble | None = None,
) -> Trouble | None:
    """Train from the newest checkpoint on; the trouble that leads back to it, or None when the package is written."""
    dataset = open_dataset(job.dataset)
    steps = total_steps(job.loader, dataset, job.training)
    built, step, state = _begin(job, tokenizer, steps, checkpoints)
    learner, engine = built.learner, built.engine
    loader = open_loader(
        job.loader,
        dataset,
        tokenizer,
        global_batch_size=job.training.global_batch_size,
        image_pixels=built.image_pixels,
        max_tokens=job.model.max_tokens,
        seed=job.seed,
        reads_text=bool(job.model.text or job.model.decoder or job.teachers),
        classes=job.classes,
        stored_views=job.stored_views,
        readings=learner.readings if isinstance(learner, Student) else (),
        cores=job.training.cpus_per_worker,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=engine.device,
        state=state,
    )
    if journal:
        where = {"epoch": state.epoch, "position": state.position, "workers": dist.get_world_size()}
        if after is None:
            journal.event(step, "started", **where)
        else:
            journal.event(step, "rewound", **where, steps=after.steps, reason=after.what)

    def save(step: int, state: LoaderState, metrics: Mapping[str, float], reason: str) -> bool:
        is_begun = checkpoints.save(engine, step, state, metrics)
        if reason == PREEMPTION:
            checkpoints.finish(step)  # this machine may be gone before the next one
        flush()
        return is_begun

    try:
        with contextlib.closing(iter(loader)) as ready:
            train(
                engine,
                ready,
                first_step=step,
                state=state,
                total_steps=steps,
                log_every=job.training.log_every_steps,
                due=due,
                save=save,
                guards=guards,
                journal=journal,
                shard_name=lambda dataset, shard: loader.readers[dataset].shards[shard].name,
                at=pulse.at,
                memory_headroom=job.training.guards.memory_headroom,
            )
    except Rewind as rewind:
        checkpoints.finish(step)
        engine.destroy()
        return rewind.trouble
    except TrainingError:
        checkpoints.settle()  # what is on its way is what a restart goes on from
        raise
    checkpoints.finish(steps)  # a package that is whole must not be lost with a checkpoint that nobody will need
    _write(job, learner, averaged_by=engine if job.training.ema_decay is not None else None)
    return None


def _keep(store: str, guards: Guards) -> None:
    """Have a restart know of a rewind: the checkpoint that it goes back to is older. Rank 0 writes."""
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # the other ranks go on, and so does this one
            write_json(join(store, GUARDS), guards.state())


def _recall(store: str, guards: Guards) -> None:
    """What rewinds of an earlier process are known. Collective."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, CorruptArtifactError, MissingArtifactError):
            box = [read_json(join(store, GUARDS))]
    dist.broadcast_object_list(box)
    if box[0] is not None:
        guards.restore(box[0])


@dataclass(frozen=True)
class _Built:
    """What is trained, the side of the pictures that it is shown, and what trains it."""

    learner: Learner | Student
    image_pixels: int
    engine: Any


def _begin(
    job: TrainingJob, tokenizer: Tokenizer, steps: int, checkpoints: Checkpoints
) -> tuple[_Built, int, LoaderState]:
    """What goes on from the newest checkpoint that can be read, the steps done, and where the loader begins."""
    for saved in checkpoints.newest():
        built = _build(job, tokenizer, steps)
        state = checkpoints.load(built.engine, saved, seed=job.seed)
        if state is not None:
            return built, saved.step, state
        built.engine.destroy()
    built = _build(job, tokenizer, steps)
    # Dropout must differ between ranks, or every rank drops the same units.
    torch.manual_seed(job.seed * 1_000_003 + dist.get_rank())
    return built, 0, LoaderState()


def _build(job: TrainingJob, tokenizer: Tokenizer, steps: int) -> _Built:
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
    return _Built(learner, image_pixels, engine)


def _is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed: gloo has no error of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


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
    check(f"{job.stage}.objectives", job.objectives, model.gives, special)
    ranks = Ranks(dist.get_rank(), gather_rows, pass_on)
    learner = Learner(model, job.model, job.objectives, special, seed=job.seed, ranks=ranks)
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
