"""(shard, row) to a sample by one positioned read, checked against the index; tar headers are never parsed here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmflow.artifacts import positioned_reader
from mmflow.errors import CorruptArtifactError
from mmflow.shards.dataset import Dataset, ShardInfo
from mmflow.shards.index import MEMBERS
from mmflow.shards.samples import read_texts

OPEN_SHARDS = 64  # file descriptors and indexes that one reader keeps


@dataclass(frozen=True)
class Caption:
    """A caption and its language (BCP 47; "und" where nobody said)."""

    text: str
    language: str


@dataclass(frozen=True)
class Sample:
    """One row of a shard as it is stored."""

    key: str
    image: bytes
    extension: str
    captions: tuple[Caption, ...]
    metadata: dict[str, object]


@dataclass(frozen=True)
class _OpenShard:
    uri: str
    keys: list[str]
    extensions: list[str]
    offsets: NDArray[np.int64]  # (rows, members)
    sizes: NDArray[np.int64]  # (rows, members)
    hashes: NDArray[np.uint64]  # (rows, members)
    read: Callable[[int, int], bytes]


class Reader:
    """Random access to the samples of one split. Not shared between processes; safe between threads."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.dataset = dataset
        self.shards = tuple(shard for shard in dataset.shards(split) if shard.samples)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def __iter__(self) -> Iterator[Sample]:
        """Every sample, in the order of the tars."""
        for ordinal, shard in enumerate(self.shards):
            for row in range(shard.samples):
                yield self.read(ordinal, row)

    def read(self, shard: int, row: int) -> Sample:
        """The sample of a shard (its ordinal in `shards`) and row. Raises CorruptArtifactError naming all three."""
        opened = self._open(shard)
        offsets, sizes = opened.offsets[row], opened.sizes[row]
        first = int(offsets.min())
        block = opened.read(int((offsets + sizes).max()) - first, first)
        bodies = {}
        for member, offset, size, expected in zip(MEMBERS, offsets - first, sizes, opened.hashes[row], strict=True):
            body = block[offset : offset + size]
            if xxhash.xxh3_64_intdigest(body) != expected:
                raise CorruptArtifactError(
                    f"{opened.uri}: {member} of row {row} ({opened.keys[row]}) is not what was written; "
                    f"run `mmflow verify {self.dataset.uri}`"
                )
            bodies[member] = body
        if self.dataset.adopted:
            found, metadata = read_texts(bodies["txt"], bodies["json"])
        else:
            fields = json.loads(bodies["json"])
            found, metadata = fields["captions"], fields["metadata"]
        captions = tuple(Caption(each["text"], each["language"]) for each in found)
        return Sample(opened.keys[row], bodies["image"], opened.extensions[row], captions, metadata)

    def _open_shard(self, ordinal: int) -> _OpenShard:
        shard: ShardInfo = self.shards[ordinal]
        index = self.dataset.index(shard)
        uri = self.dataset.tar_uri(shard)
        if index.num_rows != shard.samples:
            raise CorruptArtifactError(
                f"{uri}: its index has {index.num_rows} rows, the manifest says {shard.samples}; "
                f"run `mmflow verify {self.dataset.uri}`"
            )

        def columns(suffix: str) -> NDArray[Any]:
            return np.stack([index[f"{member}_{suffix}"].to_numpy() for member in MEMBERS], axis=1)

        return _OpenShard(
            uri=uri,
            keys=index["key"].to_pylist(),
            extensions=index["image_extension"].to_pylist(),
            offsets=columns("offset"),
            sizes=columns("bytes"),
            hashes=columns("xxh3"),
            read=positioned_reader(uri),
        )
