"""Saving and loading a training's state: DeepSpeed's, the loader's position and each rank's random state.

All ranks write a checkpoint, and any number of ranks reads it. Ray Train's own checkpoints are not used: it overwrites
its list of them in place, so that a driver killed meanwhile cannot start again; a failed upload ends the run; and it
offers only the newest, damaged or not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from mmflow.core.errors import CorruptArtifactError, TrainingError
from mmflow.core.storage import local_path, scratch_directory
from mmflow.loading.plan import LoaderState
from mmflow.models.encoders import parameter_count
from mmflow.training.checkpoint_store import (
    STAGING,
    Saved,
    best_first,
    copy,
    directory_of,
    publish_part,
    remove,
    remove_from,
    remove_staging,
    saved_checkpoints,
    superfluous,
    verify,
)
from mmflow.training.config import CheckpointsConfig
from mmflow.training.engine import average_buffers, random_state, set_random_state
from mmflow.training.journal import Journal
from mmflow.training.zero import layout, load_reshaped, state_hash

STATE = "state"
BUFFERS = "buffers.pt"
BYTES_PER_PARAMETER = 16  # a weight, its fp32 master and two moments: the estimate for the first checkpoint


class Checkpoints:
    """A training's checkpoints as one rank writes and reads them. Every rank calls every method, in step.

    DeepSpeed writes its files while the ranks wait; checksums, fsync and the upload run in a background thread.
    """

    def __init__(self, store: str, config: CheckpointsConfig, journal: Journal) -> None:
        self._store, self._config, self._journal = store, config, journal
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._scratch = (local_path(store) or scratch_directory(store)) / f"{STAGING}{self._rank}"
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._publishing: tuple[str, Future[None]] | None = None
        self._bytes = 0  # of the last checkpoint, over all ranks
        if self._rank == 0:
            remove_staging(store)
        dist.barrier()

    # --- writing ----------------------------------------------------------------------------------------------------

    def save(self, engine: Any, step: int, state: LoaderState, metrics: Mapping[str, float], **facts: Any) -> bool:
        """Begin a checkpoint of a step with some facts; False where there is no room. Raises TrainingError for that
        where the recipe says to stop."""
        self.finish(step)
        problem = first_problem(self._make_room(step) if self._rank == 0 else "")
        problem = problem or first_problem(self._room_problem(engine))
        problem = problem or first_problem(_write(engine, self._scratch))
        if problem:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._without(step, problem)
            return False
        part: dict[str, Any] = {
            "rank": self._rank,
            "world_size": self._world_size,
            "state_hash": state_hash(engine),
            "layout": layout(engine),
            "step": step,
            "loader": asdict(state),
            "metrics": dict(metrics),
            **facts,
        }
        uri = directory_of(self._store, step)
        self._publishing = uri, self._background.submit(publish_part, uri, self._scratch, **part)
        return True

    def finish(self, step: int) -> None:
        """Wait until the last checkpoint is published, on all ranks."""
        problem = ""
        if self._publishing is not None:
            try:
                uri, published = self._publishing
                published.result()
            except Exception as error:  # from the disk or an object store's client; if raised here, others would wait
                problem = f"{uri}: the checkpoint could not be published ({_line(error)})"
            self._publishing = None
        problem = first_problem(problem)
        if problem:
            self._without(step, problem)

    def settle(self) -> None:
        """Wait until this rank's part of the last checkpoint is published or has failed, whatever the other ranks do:
        they may have failed."""
        if self._publishing is not None:
            self._publishing[1].exception()

    def _make_room(self, step: int) -> str:
        """Remove the checkpoints that are not kept, and those of this step and later, which were refused or half
        written: their parts must not mix with new ones. Returns a problem instead of raising, so that no rank waits."""
        try:
            remove_from(self._store, step)
            saved = saved_checkpoints(self._store)
            if saved:
                self._bytes = saved[0].bytes
            for checkpoint in superfluous(saved, self._config):
                remove(checkpoint.uri)
        except OSError as error:
            return f"{self._store}: {_line(error)}"
        return ""

    def _room_problem(self, engine: Any) -> str:
        """Make this rank's scratch directory; the problem if there is too little room. Rank 0 checks a shared disk."""
        try:
            shutil.rmtree(self._scratch, ignore_errors=True)
            (self._scratch / STATE).mkdir(parents=True)
        except OSError as error:
            return str(error)
        is_shared = local_path(self._store) is not None
        if is_shared and self._rank > 0:
            return ""
        needed = self._bytes or BYTES_PER_PARAMETER * parameter_count(engine.module)
        if not is_shared:
            needed //= self._world_size
        directory = self._scratch.parent
        free = shutil.disk_usage(directory).free
        if free >= needed:
            return ""
        return (
            f"{directory}: a checkpoint needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, or "
            "lower training.checkpoints.keep_last or keep_best"
        )

    def _without(self, step: int, problem: str) -> None:
        if self._config.without_room == "stop":
            raise TrainingError(f"step {step}: no checkpoint: {problem}; a rerun resumes from the one before")
        self._journal.event(step, "no_checkpoint", reason=problem)

    # --- reading ----------------------------------------------------------------------------------------------------

    def newest(self) -> Iterator[Saved]:
        """The whole and undamaged checkpoints, newest first; the journal names the others. The same on all ranks.

        Raises CorruptArtifactError when there were some and the caller used none: the user decides whether to start
        again from nothing.
        """
        return self._readable(saved_checkpoints)

    def best(self) -> Iterator[Saved]:
        """The same, best `best_metric` first; none where no checkpoint has the metric."""
        return self._readable(lambda store: best_first(saved_checkpoints(store), self._config))

    def _readable(self, find: Callable[[str], list[Saved]]) -> Iterator[Saved]:
        box: list[list[Saved]] = [[]]
        problem = ""
        if self._rank == 0:
            try:
                box = [find(self._store)]
            except OSError as error:
                problem = f"{self._store}: {_line(error)}"
        problem = first_problem(problem)
        if problem:
            raise CorruptArtifactError(f"{problem}; repair it and run the same command again")
        dist.broadcast_object_list(box)
        for saved in box[0]:
            problem = ""
            try:
                verify(saved, self._rank, self._world_size)
            except (CorruptArtifactError, OSError) as error:
                problem = str(error)
            if not self._is_refused(saved, problem):
                yield saved
        if box[0]:
            raise CorruptArtifactError(
                f"{self._store}: none of its {len(box[0])} checkpoints can be used, the journal says why; restore one "
                "from a backup, or delete the directory to start the training again"
            )

    def _is_refused(self, saved: Saved, problem: str) -> bool:
        """Whether any rank has a problem with a checkpoint, which goes into the journal."""
        problem = first_problem(problem)
        if problem:
            self._journal.event(saved.step, "refused", reason=problem)
        return bool(problem)

    def load(self, engine: Any, saved: Saved, *, seed: int) -> LoaderState | None:
        """Restore an engine and this rank's random state; where the loader continues. None where any rank fails: the
        engine cannot be used then.

        On another number of ranks the random state is a new one that follows from (seed, step, rank). DeepSpeed can
        start from scratch without a message when it does not find what it expects (DeepSpeed#6691), so the loaded state
        is compared with the saved one. On the same number of ranks its loader unpickles files, which can run code: a
        checkpoint must come from this workspace.
        """
        with self._local_files(saved) as directory:
            problem = self._load(engine, saved, directory, seed)
        if self._is_refused(saved, problem):
            return None
        return LoaderState(**saved.facts["loader"])

    def _load(self, engine: Any, saved: Saved, directory: Path, seed: int) -> str:
        """Load a checkpoint; what is wrong with it, or nothing."""
        same = saved.world_size == self._world_size
        try:
            if same or engine.zero_optimization_stage() == 0:
                engine.load_checkpoint(str(directory), tag=STATE)
            else:
                load_reshaped(engine, saved.parts, directory)
            buffers = torch.load(directory / BUFFERS, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, buffer in engine.module.named_buffers():  # running statistics
                    buffer.copy_(buffers[name])
            random = torch.load(directory / f"random-{self._rank}.pt", weights_only=True) if same else None
        except Exception as error:  # DeepSpeed raises whatever it runs into
            return f"{saved.uri}: {type(error).__name__} {_line(error)}"
        if engine.global_steps != saved.step:
            return f"{saved.uri}: DeepSpeed loaded step {engine.global_steps}, not {saved.step}"
        if state_hash(engine) != saved.parts[0]["state_hash"]:
            return f"{saved.uri}: the loaded state differs from the saved one"
        # A run that resumes on another kind of device cannot use the saved random state.
        if random is None or (engine.device.type == "cuda") != ("cuda" in random):
            numbers = (seed, saved.step, self._rank)
            torch.manual_seed(xxhash.xxh3_64_intdigest(repr(numbers).encode()) % 2**63)
        else:
            set_random_state(engine.device, random)
        return ""

    @contextlib.contextmanager
    def _local_files(self, saved: Saved) -> Iterator[Path]:
        """A directory with a checkpoint's files; from an object store one rank of each machine downloads them."""
        here = local_path(saved.uri)
        if here is not None:
            yield here
            return
        box = [os.urandom(8).hex()]
        dist.broadcast_object_list(box)
        directory = Path(tempfile.gettempdir()) / f"mmflow-restore-{box[0]}"
        downloads = os.environ.get("LOCAL_RANK", "0") == "0"
        problem = ""
        try:
            if downloads:
                try:
                    copy(saved, directory)
                except OSError as error:
                    problem = f"{saved.uri}: {error}"
            problem = first_problem(problem)
            if problem:
                raise CorruptArtifactError(problem)
            yield directory
            dist.barrier()  # the others may still be reading
        finally:
            if downloads:
                shutil.rmtree(directory, ignore_errors=True)


def _write(engine: Any, scratch: Path) -> str:
    """Write this rank's files into its scratch directory; the first problem, or nothing."""
    problems = []

    def save(state_dict: Any, path: str | Path) -> None:
        # Does not raise: the other ranks would wait in DeepSpeed's barrier for the one that did.
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # a full disk raises either
            problems.append(f"{scratch.parent}: {_line(error)}")

    average_buffers(engine.module)
    save(random_state(engine.device), scratch / f"random-{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        save(dict(engine.module.named_buffers()), scratch / BUFFERS)
    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda _: None  # 60 kB of DeepSpeed's tools in every checkpoint
    engine.save_checkpoint(str(scratch), tag=STATE, save_latest=False)
    return problems[0] if problems else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def first_problem(problem: str) -> str:
    """The problem of the first rank that has one, and its number; "" where none has. Every rank must call it, so that
    they continue, or give up, together."""
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), "")
