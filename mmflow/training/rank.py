"""One rank of a training, whoever started it: Ray Train, torchrun, or a plain process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, TrainingError
from mmflow.core.storage import join, read_json, write_json
from mmflow.loading.loader import START
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import read_tokenizer
from mmflow.models.encoders import parameter_count
from mmflow.models.lora import adapter_count, merged
from mmflow.models.model import with_special_tokens
from mmflow.models.package import portable, write_package
from mmflow.training.checkpoint_store import Saved
from mmflow.training.checkpoints import Checkpoints
from mmflow.training.engine import average_buffers, prepare_deepspeed, whole_state
from mmflow.training.guards import Guards, Pulse, Rewind, Trouble
from mmflow.training.job import Built, TrainingJob, build, open_source, open_validation, total_steps
from mmflow.training.journal import Journal, appended
from mmflow.training.loop import PREEMPTION, Due, TrainingLoop
from mmflow.training.metrics import peak_flops

GUARDS = "guards.json"  # beside the checkpoints


def run_rank(job: TrainingJob, preempted: Callable[[], bool] = lambda: False) -> None:
    """Train to the last step, from the newest readable checkpoint on, and write the package. Collective.

    `preempted` says whether a machine of the ranks will be taken away; it is called on all ranks at once.
    """
    prepare_deepspeed()
    tokenizer = read_tokenizer(job.tokenizer_json)
    job = replace(job, model=with_special_tokens(f"{job.stage}.model", job.model, tokenizer))
    config = job.training
    is_first = dist.get_rank() == 0
    with (
        appended(job.journal) if is_first else contextlib.nullcontext(Journal()) as journal,
        Pulse(60 * config.guards.hung_after_minutes, journal) as pulse,
    ):
        due = Due(
            every_steps=config.checkpoint_every_steps,
            every_minutes=config.checkpoint_every_minutes,
            preempted=preempted,
        )
        checkpoints = Checkpoints(job.checkpoints, config.checkpoints, journal)
        rank = _Rank(job, tokenizer, checkpoints, Guards(config.guards), due, pulse, journal)
        try:
            rank.recall_rewinds()
            trouble = rank.train()
            while trouble is not None:
                rank.remember_rewind(trouble)
                trouble = rank.train(after=trouble)
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo has no error of its own
                raise
            raise TrainingError(f"{' '.join(str(error).split())[:200]}; {pulse.missing()}") from error


@dataclass(frozen=True)
class _Rank:
    """What a rank keeps when its training goes back to a checkpoint."""

    job: TrainingJob
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    guards: Guards
    due: Due
    pulse: Pulse
    journal: Journal

    def train(self, after: Trouble | None = None) -> Trouble | None:
        """Train from the newest checkpoint on. Returns None when the package is written, or the trouble for which the
        training must go back."""
        job, config, checkpoints, journal = self.job, self.job.training, self.checkpoints, self.journal
        steps = total_steps(job.tasks, job.dataset, config)
        built, saved, state = self._begin(steps)
        step, engine = saved.step if saved else 0, built.engine
        loader = open_source(job, self.tokenizer, engine.device, state, built.learner)
        validation = open_validation(job, self.tokenizer, engine.device, steps)
        if validation and saved:
            validation.best.restore(saved.facts.get("best", {}))
            validation.examined = saved.facts.get("examined", saved.step)
        self._note_start(step, state, built, after)

        def save(step: int, state: LoaderState, metrics: Mapping[str, float], reason: str) -> bool:
            facts = {"best": validation.best.state(), "examined": validation.examined} if validation else {}
            journal.flush()  # first: a run that resumes from this step writes none of the lines before it
            is_begun = checkpoints.save(engine, step, state, metrics, **facts)
            if reason == PREEMPTION:
                checkpoints.finish(step)  # this machine may be gone before the next checkpoint
                journal.flush()
            return is_begun

        loop = TrainingLoop(
            engine=engine,
            total_steps=steps,
            log_every=config.log_every_steps,
            due=self.due,
            save=save,
            guards=self.guards,
            journal=journal,
            shard_name=lambda dataset, shard: loader.readers[dataset].shards[shard].name,
            at=self.pulse.at,
            memory_headroom=config.guards.memory_headroom,
            task_names=job.task_names,
            validation=validation,
            peak_flops=peak_flops(engine.device, config),
        )
        try:
            with contextlib.closing(iter(loader)) as batches:
                last = loop.run(batches, first_step=step, state=state)
        except Rewind as rewind:
            checkpoints.finish(step)
            engine.destroy()
            return rewind.trouble
        except TrainingError:
            journal.flush()  # before this rank's end becomes the other ranks' too
            checkpoints.settle()  # a restart resumes from the checkpoint that is being published
            raise
        checkpoints.finish(last)  # here, or a whole package would be lost with a checkpoint that nobody needs
        ending: dict[str, Any] = {"steps": last}
        if validation and validation.best.ended:
            ending |= {"stopped": validation.best.ended, "packaged_step": self._load_best(engine) or last}
        journal.flush()  # a run that finds the package trains no more
        self._write_package(built, ending)
        return None

    def _begin(self, steps: int) -> tuple[Built, Saved | None, LoaderState]:
        """What is trained, the checkpoint that it resumes from, and where the loader begins."""
        job = self.job
        for saved in self.checkpoints.newest():
            built = build(job, self.tokenizer, steps)
            state = self.checkpoints.load(built.engine, saved, seed=job.seed)
            if state is not None:
                return built, saved, state
            built.engine.destroy()
        built = build(job, self.tokenizer, steps)
        # Dropout must differ between ranks, or every rank drops the same units.
        torch.manual_seed(job.seed * 1_000_003 + dist.get_rank())
        return built, None, START

    def _note_start(self, step: int, state: LoaderState, built: Built, after: Trouble | None) -> None:
        where = {"epoch": state.epoch, "position": state.position, "workers": dist.get_world_size()}
        if after is not None:
            self.journal.event(step, "rewound", **where, steps=after.steps, reason=after.message)
            return
        self.journal.event(step, "started", **where)
        if step == 0 and built.begun is not None:
            self.journal.event(step, "begun", package=self.job.start, **asdict(built.begun))

    def _load_best(self, engine: Any) -> int | None:
        """Load the best checkpoint; its step, or None where none is kept."""
        if self.job.training.checkpoints.keep_best:
            for saved in self.checkpoints.best():
                if self.checkpoints.load(engine, saved, seed=self.job.seed) is not None:
                    return saved.step
        return None

    def _write_package(self, built: Built, ending: Mapping[str, Any]) -> None:
        job, model = self.job, built.model
        average_buffers(built.learner)
        state = whole_state(model, built.engine if job.training.ema_decay is not None else None)
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

    def remember_rewind(self, trouble: Trouble) -> None:
        """Note a rewind where a restart finds it: the checkpoint that the training goes back to is older."""
        self.guards.rewound(trouble)
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # the other ranks continue, and so does this one
                write_json(join(self.job.checkpoints, GUARDS), self.guards.state())

    def recall_rewinds(self) -> None:
        """Restore what an earlier process noted. Collective."""
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError, CorruptArtifactError, MissingArtifactError):
                box = [read_json(join(self.job.checkpoints, GUARDS))]
        dist.broadcast_object_list(box)
        if box[0] is not None:
            self.guards.restore(box[0])
