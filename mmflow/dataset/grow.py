"""Growing a dataset: when files were added to its sources, its shards stay as they are and new ones join them.

Reshuffling everything would rewrite every byte for a few new records. The loader permutes shards anyway; the only loss
is that old and new samples do not meet within one shard.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmflow.cleaning.prepare import PREPARE_VERSION
from mmflow.core.artifacts import content_hash
from mmflow.core.errors import MmflowError
from mmflow.core.storage import COPY_BYTES, filesystem, fsync_directory, join, local_path, publish
from mmflow.dataset.config import ShardConfig
from mmflow.dataset.format import (
    CommittedShards,
    ShardInfo,
    index_uri,
    quarantine_uri,
    read_column,
    tar_uri,
    write_parquet,
)
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.write import WRITE_VERSION
from mmflow.sources.config import SourceConfig
from mmflow.sources.records import Unit
from mmflow.sources.sources import source_names

PARTS = "sources.parquet"  # beside the manifest: which parts of its sources a dataset was made from
SOURCES = "sources"  # the stage's input that stands for the parts
COMMON = "common_captions.parquet"
# Errors of file systems that cannot link: another device, no permission, no links at all, too many of them.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def settings_of_build(settings: ShardConfig) -> dict[str, Any]:
    """What decides about the shards besides the records."""
    return {**settings.identity(), "versions": [PREPARE_VERSION, WRITE_VERSION]}


def parts_of(units: Sequence[Unit], sources: Sequence[SourceConfig]) -> list[str]:
    """A hash of each unit's name, content and way of reading, (units,): the same wherever the unit is stored."""
    names = source_names([source.uri for source in sources])
    options = [source.identity() for source in sources]
    return [
        content_hash([names[unit.source], options[unit.source], unit.name, unit.fingerprint])[:32] for unit in units
    ]


def write_parts(uri: str, parts: Iterable[str]) -> None:
    """Publish which parts the dataset at `uri` is made from."""
    write_parquet(join(uri, PARTS), pa.table({"part": sorted(parts)}))


def read_parts(uri: str) -> frozenset[str]:
    """Which parts a dataset was made from."""
    return frozenset(read_column(join(uri, PARTS), "part").to_pylist())


def find_base(
    candidates: Iterable[str], settings: ShardConfig, parts: Set[str], inputs: Mapping[str, str]
) -> Dataset | None:
    """The dataset to grow: of the committed ones at `candidates` with all their parts still there, the one with most.

    It must have these settings and the stage's other `inputs`: what was fetched since, or is evaluated on now, may
    change what its old records give.
    """
    best, most = None, 0
    for uri in sorted(candidates):
        with contextlib.suppress(MmflowError):  # not a dataset, or not committed: nothing to grow
            dataset = open_dataset(uri)
            known = read_parts(uri)
            same = dataset.manifest["settings"] == settings_of_build(settings)
            others = {name: value for name, value in dataset.manifest.get("inputs", {}).items() if name != SOURCES}
            if same and others == dict(inputs) and known <= parts and len(known) > most:
                best, most = dataset, len(known)
    return best


def write_common(uri: str, hashes: NDArray[np.uint64]) -> None:
    """Publish the hashes of the captions that were too common, which the samples no longer have."""
    write_parquet(join(uri, COMMON), pa.table({"caption_hash": pa.array(hashes, pa.uint64())}))


def read_common(uri: str) -> NDArray[np.uint64]:
    """The hashes of a dataset's captions that were too common, sorted."""
    hashes: NDArray[np.uint64] = read_column(join(uri, COMMON), "caption_hash").to_numpy()
    return hashes


def bring_over(base: CommittedShards, uri: str) -> list[ShardInfo]:
    """Bring the shards, indexes and quarantine of `base` to `uri`; return their manifest entries, in order.

    On one file system they are linked, and take no space. Leftovers of a killed build are replaced. Raises MmflowError
    for a shard that is not complete.
    """
    shards = [shard for split in base.splits for shard in base.shards(split)]
    shards.sort(key=lambda shard: int(shard.name))
    for shard in shards:
        system, path = filesystem(base.tar_uri(shard))
        if system.get_file_info(path).size != shard.bytes:
            raise MmflowError(f"{base.tar_uri(shard)}: not {shard.bytes} bytes; run `mmflow verify {base.uri}`")
        for place in (tar_uri, index_uri, quarantine_uri):
            optional = [FileNotFoundError] if place is quarantine_uri else []  # none if nothing was rejected
            with contextlib.suppress(*optional), on_this_machine(place(base.uri, shard.name), beside=None) as file:
                bring(file, place(uri, shard.name))
    return shards


def bring(path: Path, target: str) -> None:
    """Publish a file under another name, by a hard link if possible, else by a copy. The file is never written to."""
    goal = local_path(target)
    if goal is not None:
        goal.parent.mkdir(parents=True, exist_ok=True)
        staging = goal.with_name(f".staging-{goal.name}")
        staging.unlink(missing_ok=True)
        try:
            os.link(path, staging)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
        else:
            # Renaming over another link of the same file does nothing and leaves both, hence the second unlink.
            os.replace(staging, goal)
            staging.unlink(missing_ok=True)
            fsync_directory(goal.parent)
            return
    with path.open("rb") as source, publish(target) as stream:
        shutil.copyfileobj(source, stream, COPY_BYTES)


@contextlib.contextmanager
def on_this_machine(uri: str, beside: Path | None) -> Iterator[Path]:
    """A file's path on this machine; for a remote file a temporary copy, in a directory that it can be linked from."""
    path = local_path(uri)
    if path is not None:
        yield path.resolve()
        return
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".staging-", dir=beside) as file:
        system, remote = filesystem(uri)
        with system.open_input_stream(remote) as stream:
            shutil.copyfileobj(stream, file, COPY_BYTES)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        yield Path(file.name)
