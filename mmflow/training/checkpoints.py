"""What a restart needs: DeepSpeed's state, the loader's position and each rank's random state.

Written by all ranks, read by any number of them. Ray Train's own checkpoints are not used: its list of them is
overwritten in place, so that a driver killed meanwhile cannot start again; a failed upload ends the run; and it offers
the newest only, whole or not.
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
from torch import Tensor, nn

from mmflow.core.errors import CorruptArtifactError, TrainingError
from mmflow.core.storage import local_path, scratch_directory
from mmflow.loading.plan import LoaderState
from mmflow.models.encoders import parameter_count
from mmflow.training.config import CheckpointsConfig
from mmflow.training.engine import average_buffers, random_state, set_random_state
from mmflow.training.store import (
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
from mmflow.training.zero import layout, load_reshaped, state_hash

STATE = "state"
BUFFERS = "buffers.pt"
BYTES_PER_PARAMETER = 16  # a weight, its fp32 master and two moments: the guess at the first checkpoint's size
Note = Callable[..., None]  # (step, event, **details): a line of rank 0's journal


class Checkpoints:
    """A training's checkpoints as one rank writes and reads them. Every rank calls every method, in step.

    DeepSpeed writes its files while the ranks wait; checksums, fsync and the upload are a background thread's.
    """

    def __init__(self, store: str, config: CheckpointsConfig, note: Note) -> None:
        self._store, self._config, self._note = store, config, note
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._publishing: tuple[str, Future[None]] | None = None
        self._bytes = 0  # of the last one, over all ranks
        if self._rank == 0:
            remove_staging(store)
        dist.barrier()

    # --- writing ----------------------------------------------------------------------------------------------------

    def save(self, engine: Any, step: int, state: LoaderState, metrics: Mapping[str, float], **facts: Any) -> bool:
        """Write a checkpoint of a step with some facts, if there is room. Raises TrainingError where the recipe says to
        stop else."""
        self.finish(step)
        problem = first_problem(self._prune(step) if self._rank == 0 else "")
        if not problem:
            problem = first_problem(self._room(engine))
        uri, scratch = directory_of(self._store, step), self._scratch()
        if not problem:
            problem = first_problem(_write(engine, scratch))
        if problem:
            shutil.rmtree(scratch, ignore_errors=True)
            self._without(step, problem)
            return False
        publish: dict[str, Any] = {
            "rank": self._rank,
            "world_size": self._world_size,
            "state_hash": state_hash(engine),
            "layout": layout(engine),
            "step": step,
            "loader": asdict(state),
            "metrics": dict(metrics),
            **facts,
        }
        self._publishing = uri, self._background.submit(publish_part, uri, scratch, **publish)
        return True

    def finish(self, step: int) -> None:
        """Wait until the last checkpoint is where it belongs, on all ranks."""
        problem = ""
        if self._publishing is not None:
            try:
                uri, published = self._publishing
                published.result()
            except Exception as error:  # of the disk or of an object store's client; raised here, the others would wait
                problem = f"{uri}: could not be brought here ({' '.join(str(error).split())[:300]})"
            self._publishing = None
        problem = first_problem(problem)
        if problem:
            self._without(step, problem)

    def settle(self) -> None:
        """Wait until this rank's part of the last checkpoint is where it belongs, or cannot be, whatever the others
        do: they may have failed."""
        if self._publishing is not None:
            self._publishing[1].exception()

    def _prune(self, step: int) -> str:
        """Make room for a step's checkpoint: remove those that are not to be kept, and those of this step and later,
        which were refused or half written: their parts must not be taken for those that come. What went wrong, or
        nothing: raised here, the other ranks would wait."""
        try:
            self._make_room(step)
        except OSError as error:
            return f"{self._store}: {' '.join(str(error).split())[:300]}"
        return ""

    def _make_room(self, step: int) -> None:
        config = self._config
        remove_from(self._store, step)
        found = saved_checkpoints(self._store)
        if found:
            self._bytes = found[0].bytes
        for each in superfluous(
            found,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            best_metric=config.best_metric,
            highest=config.best_is_highest,
        ):
            remove(each.uri)

    def _room(self, engine: Any) -> str:
        """Make this rank's scratch directory; what is wrong with the room that there is, or nothing. The room of a
        shared disk is rank 0's to look at."""
        path, scratch = local_path(self._store), self._scratch()
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / STATE).mkdir(parents=True)
        except OSError as error:
            return str(error)
        if path is not None and self._rank > 0:
            return ""
        needed = self._bytes or BYTES_PER_PARAMETER * parameter_count(engine.module)
        if path is None:
            needed //= self._world_size
        directory = scratch.parent
        free = shutil.disk_usage(directory).free
        if free >= needed:
            return ""
        return (
            f"{directory}: a checkpoint needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, or "
            "lower training.checkpoints.keep_last or keep_best"
        )

    def _scratch(self) -> Path:
        """Where this rank writes."""
        return (local_path(self._store) or scratch_directory(self._store)) / f"{STAGING}{self._rank}"

    def _without(self, step: int, problem: str) -> None:
        if self._config.without_room == "stop":
            raise TrainingError(f"step {step}: no checkpoint: {problem}; a rerun goes on from the one before")
        self._note(step, "no_checkpoint", reason=problem)

    # --- reading ----------------------------------------------------------------------------------------------------

    def newest(self) -> Iterator[Saved]:
        """Those that exist and whose files are what was written, newest first; the others are noted. Raises as
        `best`."""
        return self._readable(saved_checkpoints)

    def best(self) -> Iterator[Saved]:
        """The same, those with the best `best_metric` first. None where none has it.

        All ranks see the same ones. Raises CorruptArtifactError when there were some and the last was no use either:
        to begin anew is for whoever runs this to decide.
        """
        metric, highest = self._config.best_metric, self._config.best_is_highest
        return self._readable(lambda store: best_first(saved_checkpoints(store), metric, highest=highest))

    def _readable(self, find: Callable[[str], list[Saved]]) -> Iterator[Saved]:
        box: list[list[Saved]] = [[]]
        problem = ""
        if self._rank == 0:
            try:
                box = [find(self._store)]
            except OSError as error:
                problem = f"{self._store}: {' '.join(str(error).split())[:300]}"
        problem = first_problem(problem)
        if problem:
            raise CorruptArtifactError(f"{problem}; mend it and run the same command again")
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
                f"{self._store}: none of its {len(box[0])} checkpoints can be used, the journal says why; bring one "
                "back, or delete the directory to begin the training anew"
            )

    def _is_refused(self, saved: Saved, problem: str) -> bool:
        """Whether any rank has a problem with it, which is noted."""
        problem = first_problem(problem)
        if problem:
            self._note(saved.step, "refused", reason=problem)
        return bool(problem)

    def load(self, engine: Any, saved: Saved, *, seed: int) -> LoaderState | None:
        """Restore an engine, and this rank's random state; where the loader goes on. None
        where it cannot be, on any rank: the engine is spoilt.

        On another number of ranks the random state is a new one that follows from (seed, step, rank). DeepSpeed can
        start from scratch in silence when it does not find what it expects (DeepSpeed#6691), so what was loaded is
        compared with what was saved. On as many ranks its loader unpickles files, which can run code: a checkpoint is
        to be this workspace's own, never another's.
        """
        with self._files(saved) as directory:
            problem = self._load(engine, saved, directory, seed)
        if self._is_refused(saved, problem):
            return None
        return LoaderState(**saved.facts["loader"])

    def _load(self, engine: Any, saved: Saved, directory: Path, seed: int) -> str:
        """What is wrong with what was loaded, or nothing."""
        same = saved.world_size == self._world_size
        try:
            if same or engine.zero_optimization_stage() == 0:
                engine.load_checkpoint(str(directory), tag=STATE)
            else:
                load_reshaped(engine, saved.parts, directory)
            _load_buffers(engine.module, torch.load(directory / BUFFERS, map_location="cpu", weights_only=True))
            drawn = torch.load(directory / f"random-{self._rank}.pt", weights_only=True) if same else None
        except Exception as error:  # DeepSpeed raises what it trips over
            return f"{saved.uri}: {type(error).__name__} {' '.join(str(error).split())[:300]}"
        if engine.global_steps != saved.step:
            return f"{saved.uri}: DeepSpeed loaded step {engine.global_steps}, not {saved.step}"
        if state_hash(engine) != saved.parts[0]["state_hash"]:
            return f"{saved.uri}: what was loaded is not what was saved"
        # A run that goes on with accelerators, or without, has no use for the other kind's.
        if drawn is None or (engine.device.type == "cuda") != ("cuda" in drawn):
            torch.manual_seed(_mixed(seed, saved.step, self._rank))
        else:
            set_random_state(engine.device, drawn)
        return ""

    @contextlib.contextmanager
    def _files(self, saved: Saved) -> Iterator[Path]:
        """A directory with its files on this machine; those of an object store are brought once a machine."""
        here = local_path(saved.uri)
        if here is not None:
            yield here
            return
        box = [os.urandom(8).hex()]
        dist.broadcast_object_list(box)
        directory = Path(tempfile.gettempdir()) / f"mmflow-restore-{box[0]}"
        brings = os.environ.get("LOCAL_RANK", "0") == "0"
        problem = ""
        try:
            if brings:
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
            if brings:
                shutil.rmtree(directory, ignore_errors=True)


def _write(engine: Any, scratch: Path) -> str:
    """This rank's files, in a directory of its own; what went wrong, or nothing."""
    problems = []

    def save(state_dict: Any, path: str | Path) -> None:
        # Does not raise: the other ranks would wait in DeepSpeed's barrier for the one that did.
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # a full disk is either
            problems.append(f"{scratch.parent}: {' '.join(str(error).split())[:300]}")

    average_buffers(engine.module)
    save(random_state(engine.device), scratch / f"random-{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        save(dict(engine.module.named_buffers()), scratch / BUFFERS)
    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda _: None  # 60 kB of DeepSpeed's tools in every checkpoint
    engine.save_checkpoint(str(scratch), tag=STATE, save_latest=False)
    return problems[0] if problems else ""


@torch.no_grad()
def _load_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Running statistics, which are no rank's own part of the state."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


def _mixed(*numbers: int) -> int:
    """A seed that follows from some numbers."""
    return xxhash.xxh3_64_intdigest(repr(numbers).encode()) % 2**63


def first_problem(problem: str) -> str:
    """What went wrong on the first rank on which anything did, and on which; "" where nothing did.

    Every rank must call it: so they go on, or give up, together.
    """
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {each}" for rank, each in enumerate(problems) if each), "")
