"""Growing a dataset: when files were added to its sources, its shards stay as they are and new ones join them.

A reshuffle over everything would write every byte again for a per cent of new records. The loader permutes shards, so
what is lost is only that old and new samples do not meet within one shard.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Sequence, Set
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmflow.artifacts import content_hash, filesystem, join, local_path, publish, read_bytes
from mmflow.errors import MmflowError
from mmflow.ingest.config import SourceConfig
from mmflow.ingest.sources import source_names
from mmflow.ingest.units import Unit
from mmflow.shards.config import ShardConfig
from mmflow.shards.dataset import Dataset, ShardInfo, index_uri, open_dataset, quarantine_uri, tar_uri
from mmflow.shards.index import write_parquet

PARTS = "sources.parquet"  # beside the manifest: which parts of its sources a dataset was made from
COPY_BYTES = 8 << 20
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)  # another file system, or one without links


def settings_of_build(settings: ShardConfig) -> dict[str, Any]:
    """What decides about the shards beside the records: not where sources lie, nor how they are fetched."""
    fields = settings.model_dump(mode="json", exclude={"sources", "fetch", "grow"})
    del fields["duplicates"]["against"]  # a path; the datasets' fingerprints are inputs of the stage
    return fields


def parts_of(units: Sequence[Unit], sources: Sequence[SourceConfig]) -> list[str]:
    """What tells each unit from any other, (units,): its name, its content and how it is read, wherever it lies."""
    names = source_names([source.uri for source in sources])
    options = [source.model_dump(mode="json", exclude={"uri"}) for source in sources]
    return [
        content_hash([names[unit.source], options[unit.source], unit.name, unit.fingerprint])[:32] for unit in units
    ]


def write_parts(uri: str, parts: Iterable[str]) -> None:
    """Publish which parts the dataset at `uri` is made from."""
    write_parquet(join(uri, PARTS), pa.table({"part": sorted(parts)}))


def read_parts(uri: str) -> frozenset[str]:
    """Which parts a dataset was made from."""
    return frozenset(pq.ParquetFile(pa.BufferReader(read_bytes(join(uri, PARTS)))).read()["part"].to_pylist())


def find_base(candidates: Iterable[str], settings: ShardConfig, parts: Set[str]) -> Dataset | None:
    """Of the committed datasets at the URIs, the one to grow: of these settings, every part still there, the most."""
    best, most = None, 0
    for uri in sorted(candidates):
        with contextlib.suppress(MmflowError):  # not a dataset, or not committed: nothing to grow
            dataset = open_dataset(uri)
            found = read_parts(uri)
            if dataset.manifest["settings"] == settings_of_build(settings) and found <= parts and len(found) > most:
                best, most = dataset, len(found)
    return best


def bring_over(base: Dataset, uri: str) -> list[ShardInfo]:
    """Have the shards, indexes and quarantine of `base` at `uri` too; return their lines of the manifest, by name.

    On one file system they are linked: the same bytes, taken once. Raises MmflowError for a shard that is not whole.
    """
    shards = sorted((shard for split in base.splits for shard in base.shards(split)), key=lambda shard: shard.name)
    for shard in shards:
        system, path = filesystem(base.tar_uri(shard))
        if system.get_file_info(path).size != shard.bytes:
            raise MmflowError(f"{base.tar_uri(shard)}: not of {shard.bytes} bytes; run `mmflow verify {base.uri}`")
        _bring(base.tar_uri(shard), tar_uri(uri, shard.name))
        _bring(index_uri(base.uri, shard.name), index_uri(uri, shard.name))
        with contextlib.suppress(FileNotFoundError):
            _bring(quarantine_uri(base.uri, shard.name), quarantine_uri(uri, shard.name))
    return shards


def _bring(source: str, target: str) -> None:
    here, there = local_path(source), local_path(target)
    if here is not None and there is not None:
        there.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(here, there)
        except FileExistsError:  # a killed build had brought it
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        else:
            return
    system, path = filesystem(source)
    with system.open_input_stream(path) as stream, publish(target) as copy:
        shutil.copyfileobj(stream, copy, COPY_BYTES)
