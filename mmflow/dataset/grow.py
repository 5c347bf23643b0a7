"""Growing a dataset: when files were added to its sources, its shards stay as they are and new ones join them.

A reshuffle over everything would write every byte again for a per cent of new records. The loader permutes shards, so
what is lost is only that old and new samples do not meet within one shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmflow.cleaning.prepare import PREPARE_VERSION
from mmflow.core.artifacts import content_hash
from mmflow.core.errors import MmflowError
from mmflow.core.storage import filesystem, join
from mmflow.dataset.bring import bring, on_this_machine
from mmflow.dataset.config import ShardConfig
from mmflow.dataset.index import read_column, write_parquet
from mmflow.dataset.manifest import ShardInfo, index_uri, quarantine_uri, tar_uri
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.write import WRITE_VERSION
from mmflow.sources.config import SourceConfig
from mmflow.sources.records import Unit
from mmflow.sources.sources import source_names

PARTS = "sources.parquet"  # beside the manifest: which parts of its sources a dataset was made from
SOURCES = "sources"  # the stage's input that stands for the parts
COMMON = "common_captions.parquet"


def settings_of_build(settings: ShardConfig) -> dict[str, Any]:
    """What decides about the shards beside the records: not where sources lie, nor how they are fetched."""
    fields = settings.model_dump(mode="json", exclude={"sources", "fetch"})
    del fields["duplicates"]["against"]  # a path; the datasets' fingerprints are inputs of the stage
    if settings.captions.required:  # as all were before there was a choice: they stay the datasets that they are
        del fields["captions"]["required"]
    return {**fields, "versions": [PREPARE_VERSION, WRITE_VERSION]}


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
    return frozenset(read_column(join(uri, PARTS), "part").to_pylist())


def find_base(
    candidates: Iterable[str], settings: ShardConfig, parts: Set[str], inputs: Mapping[str, str]
) -> Dataset | None:
    """Of the committed datasets at the URIs, the one to grow: every part still there, and the most of them.

    It must be of these settings and of the stage's other `inputs`: what was fetched since, or is evaluated on now, may
    change what its old records come to.
    """
    best, most = None, 0
    for uri in sorted(candidates):
        with contextlib.suppress(MmflowError):  # not a dataset, or not committed: nothing to grow
            dataset = open_dataset(uri)
            found = read_parts(uri)
            same = dataset.manifest["settings"] == settings_of_build(settings)
            others = {name: value for name, value in dataset.manifest.get("inputs", {}).items() if name != SOURCES}
            if same and others == dict(inputs) and found <= parts and len(found) > most:
                best, most = dataset, len(found)
    return best


def write_common(uri: str, hashes: NDArray[np.uint64]) -> None:
    """Publish the hashes of the captions that were too common: the samples no longer show them."""
    write_parquet(join(uri, COMMON), pa.table({"caption_hash": pa.array(hashes, pa.uint64())}))


def read_common(uri: str) -> NDArray[np.uint64]:
    """The hashes of a dataset's captions that were too common, sorted."""
    hashes: NDArray[np.uint64] = read_column(join(uri, COMMON), "caption_hash").to_numpy()
    return hashes


def bring_over(base: Dataset, uri: str) -> list[ShardInfo]:
    """Have the shards, indexes and quarantine of `base` at `uri` too; return their lines of the manifest, in order.

    On one file system they are linked: the same bytes, taken once. What lies there from a killed build is replaced.
    Raises MmflowError for a shard that is not whole.
    """
    shards = [shard for split in base.splits for shard in base.shards(split)]
    shards.sort(key=lambda shard: int(shard.name))
    for shard in shards:
        system, path = filesystem(base.tar_uri(shard))
        if system.get_file_info(path).size != shard.bytes:
            raise MmflowError(f"{base.tar_uri(shard)}: not of {shard.bytes} bytes; run `mmflow verify {base.uri}`")
        for place in (tar_uri, index_uri, quarantine_uri):
            absent = [FileNotFoundError] if place is quarantine_uri else []  # where nothing was rejected
            with contextlib.suppress(*absent), on_this_machine(place(base.uri, shard.name), beside=None) as file:
                bring(file, place(uri, shard.name))
    return shards
