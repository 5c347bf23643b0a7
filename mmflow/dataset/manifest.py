"""What a committed dataset consists of: the shards in its manifest, and where their files lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyarrow import fs

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import MisuseError
from mmflow.core.storage import filesystem, join
from mmflow.dataset.index import read_index

KIND = "dataset"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One entry of the manifest. A shard in which every record was rejected has no samples and an empty tar."""

    name: str  # "00000": the name of the tar and of the index, without the extension
    split: str
    samples: int
    bytes: int
    checksum: str  # xxh3_128 of the tar, hex


@dataclass(frozen=True)
class CommittedShards:
    """The shards of a committed dataset. Two are equal if they have the same URI."""

    uri: str
    manifest: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the shards' checksums. Caches, scores and lineage refer to it."""
        return str(self.manifest["fingerprint"])

    @property
    def adopted(self) -> bool:
        """Whether others wrote the tars: keys and JSON are as they are, and the index does not list every member."""
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
        """The shards of a split, in the order of their names. Raises MisuseError if there is no such split."""
        if split not in self._shards_of_split:
            raise MisuseError(f"{self.uri}: no split {split!r}; there are {', '.join(self.splits)}")
        return self._shards_of_split[split]

    def samples(self, split: str) -> int:
        """The number of samples of a split."""
        return sum(shard.samples for shard in self.shards(split))

    def tar_uri(self, shard: ShardInfo) -> str:
        """The URI of the shard's tar."""
        return tar_uri(self.uri, shard.name)

    def index(self, shard: ShardInfo) -> pa.Table:
        """The shard's index (`mmflow.dataset.index.SCHEMA`), read from storage at each call."""
        return read_index(index_uri(self.uri, shard.name))


def shard_name(number: int) -> str:
    """At least five digits, as brace ranges such as {00000..00041} expect."""
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
    """The URIs of the tables of rejected records, sorted by name."""
    system, path = filesystem(join(uri, "quarantine"))
    entries = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = sorted(info.base_name for info in entries if info.is_file and not info.base_name.startswith("."))
    return [join(uri, "quarantine", name) for name in names]


def fingerprint_of(shards: list[ShardInfo]) -> str:
    """sha256 (hex) over each shard's split and checksum, in order: the same bytes in another split are other data."""
    return content_hash([[shard.split, shard.checksum] for shard in shards])
