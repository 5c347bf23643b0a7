"""A committed dataset as its readers see it: shards, splits and random access, with neither Ray nor a tar parser."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash
from pyarrow import fs

from mmflow.core.artifacts import content_hash, read_artifact
from mmflow.core.errors import CorruptArtifactError, MisuseError
from mmflow.core.storage import filesystem, join, positioned_reader
from mmflow.dataset.index import MEMBERS, read_index

if TYPE_CHECKING:
    import webdataset

    from mmflow.dataset.cache import ShardCache

KIND = "dataset"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One line of the manifest. A shard in which every record was rejected has no samples and an empty tar."""

    name: str  # "00000": the tar's and the index's name without the extension
    split: str
    samples: int
    bytes: int
    checksum: str  # xxh3_128 of the tar, hex


@dataclass(frozen=True)
class Dataset:
    """A committed dataset; two are equal when they lie in the same place."""

    uri: str
    manifest: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the shards' checksums: what caches, scores and lineage refer to."""
        return str(self.manifest["fingerprint"])

    @property
    def adopted(self) -> bool:
        """Whether others wrote the tars: keys and JSON are as they are, and not every member is in the index."""
        return bool(self.manifest.get("adopted", False))

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, sorted."""
        return tuple(sorted(self._shards_of_split))

    @cached_property
    def _shards_of_split(self) -> dict[str, tuple[ShardInfo, ...]]:
        shards = [ShardInfo(**shard) for shard in self.manifest["shards"]]
        splits = {shard.split for shard in shards}
        return {split: tuple(shard for shard in shards if shard.split == split) for split in splits}

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of a split, in the order of their names. Raises MisuseError for a split that is not there."""
        if split not in self._shards_of_split:
            raise MisuseError(f"{self.uri}: no split {split!r}; there are {', '.join(self.splits)}")
        return self._shards_of_split[split]

    def samples(self, split: str) -> int:
        """The number of samples of a split."""
        return sum(shard.samples for shard in self.shards(split))

    def tar_uri(self, shard: ShardInfo) -> str:
        """Where the shard's tar lies."""
        return tar_uri(self.uri, shard.name)

    def index(self, shard: ShardInfo) -> pa.Table:
        """The shard's index (`mmflow.dataset.index.SCHEMA`), read from storage at each call."""
        return read_index(index_uri(self.uri, shard.name))

    def as_webdataset(
        self, split: str, *, shuffle_shards: int | None = None, cache: ShardCache | None = None
    ) -> webdataset.FluidWrapper:
        """A webdataset pipeline over the split (`mmflow.dataset.exports.as_webdataset`)."""
        from mmflow.dataset.exports import as_webdataset

        return as_webdataset(self, split, shuffle_shards=shuffle_shards, cache=cache)

    def to_ray_data(self, split: str, *, cache: ShardCache | None = None) -> Any:
        """A `ray.data.Dataset` of the split's samples (`mmflow.dataset.exports.to_ray_data`)."""
        from mmflow.dataset.exports import to_ray_data

        return to_ray_data(self, split, cache=cache)


def open_dataset(uri: str) -> Dataset:
    """The dataset at `uri`. Raises MissingArtifactError if none was committed there, MisuseError for another kind."""
    return Dataset(uri, read_artifact(uri, KIND).manifest)


def read_sample(dataset: Dataset, shard: ShardInfo, row: int) -> dict[str, Any]:
    """{"key", "image": bytes, "image_extension", "txt": str, "json": dict} of one sample.

    An adopted sample may lack its text or its JSON: "" and {}.

    Reads the index anew for each sample: for looking at samples, not for training. Raises CorruptArtifactError where a
    body no longer has the hash that the index remembers.
    """
    index = dataset.index(shard)
    if not 0 <= row < index.num_rows:
        raise MisuseError(f"{dataset.tar_uri(shard)}: no row {row}; it has {index.num_rows}")
    entry = index.slice(row, 1).to_pylist()[0]
    bodies = {}
    read = positioned_reader(dataset.tar_uri(shard))
    for member in MEMBERS:
        body = read(entry[f"{member}_bytes"], entry[f"{member}_offset"])
        if xxhash.xxh3_64_intdigest(body) != entry[f"{member}_xxh3"]:
            raise CorruptArtifactError(
                f"{dataset.tar_uri(shard)}: {member} of row {row} ({entry['key']}) is not what was written; "
                f"run `mmflow verify {dataset.uri}`"
            )
        bodies[member] = body
    return {
        "key": entry["key"],
        "image": bodies["image"],
        "image_extension": entry["image_extension"],
        "txt": bodies["txt"].decode(),
        "json": json.loads(bodies["json"] or b"{}"),
    }


# --- the layout -----------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """Five digits, more where there are more shards: what brace ranges such as {00000..00041} expect."""
    return f"{number:05d}"


def tar_uri(uri: str, name: str) -> str:
    """<dataset>/shards/<name>.tar"""
    return join(uri, "shards", f"{name}.tar")


def index_uri(uri: str, name: str) -> str:
    """<dataset>/index/<name>.parquet"""
    return join(uri, "index", f"{name}.parquet")


def quarantine_uri(uri: str, name: str) -> str:
    """<dataset>/quarantine/<name>.parquet"""
    return join(uri, "quarantine", f"{name}.parquet")


def quarantine_files(uri: str) -> list[str]:
    """The URIs of the tables of rejected records, in the order of their names."""
    system, path = filesystem(join(uri, "quarantine"))
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = sorted(info.base_name for info in found if info.is_file and not info.base_name.startswith("."))
    return [join(uri, "quarantine", name) for name in names]


def fingerprint_of(shards: list[ShardInfo]) -> str:
    """sha256 (hex) over each shard's split and checksum, in order: the same bytes in another split are other data."""
    return content_hash([[shard.split, shard.checksum] for shard in shards])
