"""One rank of a training, whoever started it: Ray Train, torchrun, or a plain process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, TrainingError
from mmflow.core.storage import join, read_json, write_json
from mmflow.learning.student import Student
from mmflow.loading.loader import START
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import read_tokenizer
from mmflow.models.encoders import parameter_count
from mmflow.models.lora import adapter_count, merged
from mmflow.models.model import with_special_tokens
from mmflow.models.package import portable, write_package
from mmflow.training.checkpoints import Checkpoints
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import average_buffers, prepare_deepspeed, whole_state
from mmflow.training.guards import Guards, Pulse, Rewind, Trouble
from mmflow.training.job import Built, Learning, TrainingJob, build, model_of, open_source, open_validation, total_steps
from mmflow.training.journal import Journal, appended
from mmflow.training.loop import PREEMPTION, Due, train
from mmflow.training.metrics import peak_flops
from mmflow.training.store import Saved

GUARDS = "guards.json"  # beside the checkpoints


def run_rank(job: TrainingJob, preempted: Callable[[], bool] = lambda: False) -> None:
    """Train to the last step, from the newest checkpoint that can be read, and write the package. Collective.

    `preempted` says whether a machine that the ranks are on is to go; it is asked on all ranks at once.
    """
    prepare_deepspeed()
    tokenizer = read_tokenizer(job.tokenizer_json)
    job = replace(job, model=with_special_tokens(f"{job.stage}.model", job.model, tokenizer))
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
            rank = _Rank(job, tokenizer, checkpoints, guards, due, pulse, journal, flush)
            try:
                _recall(job.checkpoints, guards)
                trouble = _train(rank)
                while trouble is not None:
                    guards.rewound(trouble)
                    _keep(job.checkpoints, guards)
                    trouble = _train(rank, after=trouble)
            except RuntimeError as error:
                if not _is_of_an_exchange(error):
                    raise
                raise TrainingError(f"{' '.join(str(error).split())[:200]}; {pulse.missing()}") from error


@dataclass(frozen=True)
class _Rank:
    """What a rank has at hand through all that its training goes back to."""

    job: TrainingJob
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    guards: Guards
    due: Due
    pulse: Pulse
    journal: Journal | None  # rank 0's
    flush: Callable[[], object]  # have the journal's store hold all of it


def _train(rank: _Rank, after: Trouble | None = None) -> Trouble | None:
    """Train from the newest checkpoint on; the trouble that leads back to it, or None when the package is written."""
    job, checkpoints, journal = rank.job, rank.checkpoints, rank.journal
    steps = total_steps(job.tasks, job.dataset, job.training)
    built, saved, state = _begin(rank, steps)
    step = saved.step if saved else 0
    learner, engine = built.learner, built.engine
    readings = learner.readings if isinstance(learner, Student) else ()
    loader = open_source(job, rank.tokenizer, engine.device, state, image_pixels=built.image_pixels, readings=readings)
    validation = open_validation(job, rank.tokenizer, engine.device, steps)
    if validation and saved:
        validation.best.restore(saved.facts.get("best", {}))
        validation.examined = saved.facts.get("examined", saved.step)
    if journal:
        where = {"epoch": state.epoch, "position": state.position, "workers": dist.get_world_size()}
        if after is None:
            journal.event(step, "started", **where)
            if step == 0 and built.begun is not None:
                journal.event(step, "begun", package=job.start, **asdict(built.begun))
        else:
            journal.event(step, "rewound", **where, steps=after.steps, reason=after.what)

    def save(step: int, state: LoaderState, metrics: Mapping[str, float], reason: str) -> bool:
        facts = {"best": validation.best.state(), "examined": validation.examined} if validation else {}
        rank.flush()  # first: who goes on from this step writes none of the lines before it
        is_begun = checkpoints.save(engine, step, state, metrics, **facts)
        if reason == PREEMPTION:
            checkpoints.finish(step)  # this machine may be gone before the next one
            rank.flush()
        return is_begun

    try:
        with contextlib.closing(iter(loader)) as ready:
            last = train(
                engine,
                ready,
                first_step=step,
                state=state,
                total_steps=steps,
                log_every=job.training.log_every_steps,
                due=rank.due,
                save=save,
                guards=rank.guards,
                journal=journal,
                shard_name=lambda dataset, shard: loader.readers[dataset].shards[shard].name,
                at=rank.pulse.at,
                memory_headroom=job.training.guards.memory_headroom,
                tasks=[each.name for each in job.several],
                validation=validation,
                peak_flops=_peak_flops(job.training, engine.device),
            )
    except Rewind as rewind:
        checkpoints.finish(step)
        engine.destroy()
        return rewind.trouble
    except TrainingError:
        rank.flush()  # before another rank's end is this one's too
        checkpoints.settle()  # what is on its way is what a restart goes on from
        raise
    checkpoints.finish(last)  # a package that is whole must not be lost with a checkpoint that nobody will need
    ending: dict[str, Any] = {"steps": last}
    if validation and validation.best.ended:
        ending |= {"stopped": validation.best.ended, "packaged_step": _bring_best(rank, engine) or last}
    rank.flush()  # who finds the package trains no more
    _write(job, learner, ending, averaged_by=engine if job.training.ema_decay is not None else None)
    return None


def _bring_best(rank: _Rank, engine: Any) -> int | None:
    """Load the best checkpoint and give its step; None where none is kept."""
    if rank.job.training.checkpoints.keep_best:
        for saved in rank.checkpoints.best():
            if rank.checkpoints.load(engine, saved, seed=rank.job.seed) is not None:
                return saved.step
    return None


def _peak_flops(training: TrainingConfig, device: torch.device) -> float | None:
    if training.peak_tflops is not None:
        return training.peak_tflops * 1e12
    return peak_flops(device, training.precision)


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


def _begin(rank: _Rank, steps: int) -> tuple[Built, Saved | None, LoaderState]:
    """What goes on from the newest checkpoint that can be read, that checkpoint, and where the loader begins."""
    job = rank.job
    for saved in rank.checkpoints.newest():
        built = build(job, rank.tokenizer, steps)
        state = rank.checkpoints.load(built.engine, saved, seed=job.seed)
        if state is not None:
            return built, saved, state
        built.engine.destroy()
    built = build(job, rank.tokenizer, steps)
    # Dropout must differ between ranks, or every rank drops the same units.
    torch.manual_seed(job.seed * 1_000_003 + dist.get_rank())
    return built, None, START


def _is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed: gloo has no error of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _write(job: TrainingJob, learner: Learning, ending: Mapping[str, Any], averaged_by: Any) -> None:
    average_buffers(learner)
    model = model_of(learner)
    state = whole_state(model, averaged_by)
    if dist.get_rank() == 0:
        write_package(
            job.package,
            state=state if job.lora is None else merged(state, job.lora),
            config=portable(job.model, model),
            tokenizer_json=job.tokenizer_json,
            parameters=parameter_count(model) - adapter_count(model),
            lineage={**job.lineage, **ending},
            classes=job.classes,
        )
    dist.barrier()  # no rank leaves before the package is whole


@contextlib.contextmanager
def _journal(uri: str) -> Iterator[tuple[Journal | None, Callable[[], object]]]:
    """Rank 0's journal, and how to have its store hold all of it."""
    if dist.get_rank() != 0:
        yield None, lambda: None
        return
    with appended(uri) as opened:
        yield opened
