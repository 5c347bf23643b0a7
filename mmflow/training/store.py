"""Where a training's checkpoints lie, and which of them are whole.

    <checkpoints>/step-00000100/
      state/…        DeepSpeed's files, each rank's own
      random-0.pt …  each rank's random state
      buffers.pt     what the model keeps besides its parameters
      part-0.json …  the files that each rank wrote, with bytes and checksums; a rank publishes its part last

Many ranks write a checkpoint, so none of them alone can commit it: it exists once the parts of all its ranks are there
and agree. A kill at any moment leaves at worst one that does not exist yet, beside those before it.
"""

from __future__ import annotations

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

STEP = "step-"
PART = "part-"
STAGING = ".staging-"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that exists: all of its ranks' parts are there. Its files are not looked at yet."""

    uri: str
    parts: tuple[Mapping[str, Any], ...]

    @property
    def step(self) -> int:
        """The last step that it has seen."""
        return int(self.facts["step"])

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return len(self.parts)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What rank 0 said of it."""
        facts: Mapping[str, Any] = self.parts[0]["facts"]
        return facts

    @cached_property
    def files(self) -> dict[str, tuple[int, str]]:
        """Name → (bytes, checksum)."""
        return {name: (size, checksum) for part in self.parts for name, (size, checksum) in part["files"].items()}

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(size for size, _ in self.files.values())


def directory_of(store: str, step: int) -> str:
    """The URI of a step's checkpoint."""
    return join(store, f"{STEP}{step:08d}")


def saved_checkpoints(store: str) -> list[Saved]:
    """The checkpoints that exist, newest first."""
    found = []
    for name in sorted(_names(store), reverse=True):
        if name.startswith(STEP):
            uri = join(store, name)
            parts = _whole([part for each in _names(uri) if each.startswith(PART) and (part := _read_part(uri, each))])
            if parts:
                found.append(Saved(uri, parts))
    return found


def _read_part(uri: str, name: str) -> Mapping[str, Any] | None:
    """What a rank said of its part; None where it is cut short: then the checkpoint lacks a part."""
    try:
        part: Mapping[str, Any] = read_json(join(uri, name))
    except CorruptArtifactError:
        return None
    return part


def _whole(parts: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The parts in the order of ranks, if they are those of all the ranks of one checkpoint; else none."""
    if not parts:
        return ()
    first = parts[0]
    of_one = [part for part in parts if all(part[name] == first[name] for name in ("world_size", "state_hash"))]
    ranks = {part["rank"]: part for part in of_one}
    if sorted(ranks) != list(range(first["world_size"])):
        return ()
    return tuple(ranks[rank] for rank in sorted(ranks))


def publish_part(uri: str, scratch: Path, *, rank: int, world_size: int, state_hash: str, **facts: Any) -> None:
    """Bring a rank's files from its scratch directory to a checkpoint, then say so; the scratch directory goes.

    On a local disk the scratch directory lies beside the checkpoint and its files are moved.
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
    """Durably: the part that is published afterwards must not outlive a power cut that its files do not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
    fsync_directory(target.parent)


def verify(saved: Saved, share: int = 0, shares: int = 1) -> None:
    """Read one of `shares` parts of the files and compare them with what was written. Raises CorruptArtifactError."""
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
    """Bring the files of a checkpoint to a local directory."""
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
    """Remove what there is of the checkpoints of a step and of later ones."""
    for name in _names(store):
        if name.startswith(STEP) and int(name.removeprefix(STEP)) >= step:
            remove(join(store, name))


def superfluous(
    checkpoints: Sequence[Saved], *, keep_last: int, keep_best: int, best_metric: str, highest: bool
) -> Iterator[Saved]:
    """Those, newest first, that are neither among the newest nor the best."""
    scored = best_first(checkpoints, best_metric, highest=highest)
    kept = {each.uri for each in (*checkpoints[:keep_last], *scored[:keep_best])}
    return (each for each in checkpoints if each.uri not in kept)


def best_first(checkpoints: Sequence[Saved], metric: str, *, highest: bool) -> list[Saved]:
    """Those that have a finite value of the metric."""
    scored = [each for each in checkpoints if math.isfinite(each.facts["metrics"].get(metric, math.nan))]
    return sorted(scored, key=lambda each: each.facts["metrics"][metric], reverse=highest)


def remove_staging(store: str) -> None:
    """Remove what killed ranks had not brought to its place."""
    path = local_path(store)
    for each in path.glob(f"{STAGING}*") if path is not None else ():
        shutil.rmtree(each, ignore_errors=True)


def _names(uri: str) -> list[str]:
    """Names in a directory; none where there is no directory."""
    system, path = filesystem(uri)
    try:
        return [info.base_name for info in system.get_file_info(fs.FileSelector(path))]
    except FileNotFoundError:
        return []
