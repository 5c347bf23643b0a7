"""A training's checkpoints on disk: their names, which of them are whole, and which are kept.

    <checkpoints>/step-00000100/
      state/…        DeepSpeed's files, each rank's own
      random-0.pt …  each rank's random state
      buffers.pt     the model's buffers
      part-0.json …  the files that each rank wrote, with bytes and checksums; a rank publishes its part last

Many ranks write a checkpoint, so none of them can commit it alone: it exists once the parts of all its ranks are there
and agree. A kill at any moment leaves at worst one that does not exist yet, beside those before it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from pyarrow import fs

from mmflow.core.errors import CorruptArtifactError
from mmflow.core.storage import COPY_BYTES, filesystem, fsync_directory, join, local_path, read_json, write_json
from mmflow.training.config import CheckpointsConfig

STEP = "step-"
PART = "part-"
STAGING = ".staging-"


@dataclass(frozen=True)
class Saved:
    """A checkpoint with the parts of all its ranks. Its files are not checked yet."""

    uri: str
    parts: tuple[Mapping[str, Any], ...]

    @property
    def step(self) -> int:
        """The last step before the checkpoint."""
        return int(self.facts["step"])

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return len(self.parts)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts in rank 0's part."""
        facts: Mapping[str, Any] = self.parts[0]["facts"]
        return facts

    @cached_property
    def files(self) -> dict[str, tuple[int, str]]:
        """Name → (bytes, checksum)."""
        return {name: (size, checksum) for part in self.parts for name, (size, checksum) in part["files"].items()}

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(size for size, _ in self.files.values())


def directory_of(store: str, step: int) -> str:
    """The URI of a step's checkpoint."""
    return join(store, f"{STEP}{step:08d}")


def saved_checkpoints(store: str) -> list[Saved]:
    """The checkpoints that exist, newest first."""
    checkpoints = []
    for name in sorted(_names(store), reverse=True):
        if name.startswith(STEP):
            uri = join(store, name)
            parts = []
            for part in _names(uri):
                with contextlib.suppress(CorruptArtifactError):  # cut short: then the checkpoint lacks a part
                    if part.startswith(PART):
                        parts.append(read_json(join(uri, part)))
            if whole := _whole(parts):
                checkpoints.append(Saved(uri, whole))
    return checkpoints


def _whole(parts: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The parts in the order of ranks, if they are those of all the ranks of one checkpoint; else none."""
    if not parts:
        return ()
    first = parts[0]
    same = [part for part in parts if all(part[name] == first[name] for name in ("world_size", "state_hash"))]
    ranks = {part["rank"]: part for part in same}
    if sorted(ranks) != list(range(first["world_size"])):
        return ()
    return tuple(ranks[rank] for rank in sorted(ranks))


def publish_part(uri: str, scratch: Path, *, rank: int, world_size: int, state_hash: str, **facts: Any) -> None:
    """Bring a rank's files from its scratch directory to a checkpoint, then publish its part.

    On a local disk the scratch directory is beside the checkpoint and its files are moved.
    """
    target = local_path(uri)
    files = {}
    for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
        name = path.relative_to(scratch).as_posix()
        files[name] = (path.stat().st_size, _checksum(str(path)))
        if target is None:
            system, remote = filesystem(join(uri, name))
            with path.open("rb") as source, system.open_output_stream(remote) as stream:
                shutil.copyfileobj(source, stream, COPY_BYTES)
        else:
            _move(path, target / name)
    part = {"rank": rank, "world_size": world_size, "state_hash": state_hash, "files": files, "facts": facts}
    write_json(join(uri, f"{PART}{rank}.json"), part)
    shutil.rmtree(scratch)


def _move(path: Path, target: Path) -> None:
    """Move a file durably: after a power cut the published part must not be there without its files."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
    fsync_directory(target.parent)


def verify(saved: Saved, share: int = 0, shares: int = 1) -> None:
    """Read one of `shares` shares of the files and compare them with what was written. Raises CorruptArtifactError."""
    for name, (size, checksum) in sorted(saved.files.items())[share::shares]:
        uri = join(saved.uri, name)
        system, path = filesystem(uri)
        info = system.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise CorruptArtifactError(f"{uri}: gone, so the checkpoint is not whole")
        if info.size != size:
            raise CorruptArtifactError(f"{uri}: {info.size} bytes, {size} were written")
        if _checksum(uri) != checksum:
            raise CorruptArtifactError(f"{uri}: not the bytes that were written")


def _checksum(uri: str) -> str:
    system, path = filesystem(uri)
    digest = xxhash.xxh3_128()
    with system.open_input_stream(path) as stream:
        while block := stream.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def copy(saved: Saved, directory: Path) -> None:
    """Copy the files of a checkpoint to a local directory."""
    for name in saved.files:
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        system, path = filesystem(join(saved.uri, name))
        with system.open_input_stream(path) as source, target.open("wb") as stream:
            shutil.copyfileobj(source, stream, COPY_BYTES)


def remove(uri: str) -> None:
    """Remove a checkpoint, its parts first: one that is half removed does not exist. Nothing where there is none."""
    names = _names(uri)
    if not names:
        return
    system, path = filesystem(uri)
    for name in names:
        if name.startswith(PART):
            system.delete_file(f"{path}/{name}")
    system.delete_dir(path)


def remove_from(store: str, step: int) -> None:
    """Remove the checkpoints of a step and of later ones, whole or not."""
    for name in _names(store):
        if name.startswith(STEP) and int(name.removeprefix(STEP)) >= step:
            remove(join(store, name))


def superfluous(checkpoints: Sequence[Saved], config: CheckpointsConfig) -> Iterator[Saved]:
    """The checkpoints, given newest first, that are neither among the newest nor the best."""
    best = best_first(checkpoints, config)[: config.keep_best]
    kept = {checkpoint.uri for checkpoint in (*checkpoints[: config.keep_last], *best)}
    return (checkpoint for checkpoint in checkpoints if checkpoint.uri not in kept)


def best_first(checkpoints: Sequence[Saved], config: CheckpointsConfig) -> list[Saved]:
    """The checkpoints with a finite `best_metric`, best first."""
    metric = config.best_metric
    scored = [saved for saved in checkpoints if math.isfinite(saved.facts["metrics"].get(metric, math.nan))]
    return sorted(scored, key=lambda saved: saved.facts["metrics"][metric], reverse=config.best_is_highest)


def remove_staging(store: str) -> None:
    """Remove what killed ranks had not published."""
    path = local_path(store)
    for directory in path.glob(f"{STAGING}*") if path is not None else ():
        shutil.rmtree(directory, ignore_errors=True)


def _names(uri: str) -> list[str]:
    """Names in a directory; none where there is no directory."""
    system, path = filesystem(uri)
    try:
        return [info.base_name for info in system.get_file_info(fs.FileSelector(path))]
    except FileNotFoundError:
        return []
