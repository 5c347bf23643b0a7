"""Which shard a record belongs to, as a pure function of the record: the global shuffle, without a global sort.

The order of a dataset is the order of its keys' hashes under a seed. The hashes of each split are cut into equal
ranges, one a shard; within a shard samples stand in the order of their hashes. So a record's place needs
no other record, and the same records make the same shards however they were spread over files, blocks and workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

# What a sample takes beside its images: three headers, a caption and JSON of at most a block, in bytes.
OTHER_BYTES = 5 * 512
# Rows of `PIECE` with the pack of their images, and where each goes.
ASSIGNED = (("shard", pa.int64()), ("hash", pa.uint64()))


class Extent(NamedTuple):
    """How much of something there is."""

    samples: int
    bytes: int


def with_verdicts(rows: pa.Table, rejected: pa.Table) -> pa.Table:
    """The rows, those of them rejected that `rejected` (place, reason, detail; sorted by place) names."""
    places = rejected["place"].to_numpy()
    found = np.searchsorted(places, rows["place"].to_numpy())
    hit = np.zeros(rows.num_rows, bool)
    inside = found < len(places)
    hit[inside] = places[found[inside]] == rows["place"].to_numpy()[inside]
    take = pa.array(found, mask=~hit)
    for name in ("reason", "detail"):
        verdict = rejected[name].combine_chunks().take(take)
        position = rows.schema.get_field_index(name)
        rows = rows.set_column(position, rows.schema.field(position), pc.coalesce(rows[name], verdict))
    return rows


def extents_of_splits(rows: pa.Table) -> dict[str, Extent]:
    """What the good rows of each split come to."""
    good = rows.filter(pc.is_null(rows["reason"]))
    frames = good["frames"].combine_chunks()
    parents = frames.value_parent_indices().to_numpy()
    size = good["image_bytes"].to_numpy().astype(np.int64) + OTHER_BYTES
    np.add.at(size, parents, frames.flatten().field("bytes").to_numpy(zero_copy_only=False) + 512)
    split = np.array(good["split"].to_pylist(), dtype=str)
    return {str(name): Extent(int((split == name).sum()), int(size[split == name].sum())) for name in np.unique(split)}


def shards_of_splits(
    extents: Mapping[str, Extent], samples_per_shard: int, bytes_per_shard: int, first: int = 0
) -> dict[str, range]:
    """Each split's shards by number, from `first` on, counted over the splits in the order of their names."""
    shards = {}
    for split in sorted(extents):
        extent = extents[split]
        num_shards = max(-(-extent.samples // samples_per_shard), -(-extent.bytes // bytes_per_shard))
        shards[split] = range(first, first + num_shards)
        first += num_shards
    return shards


def span(shards: Mapping[str, range]) -> range:
    """The numbers of all splits' shards, which follow one another."""
    return range(min(numbers.start for numbers in shards.values()), max(numbers.stop for numbers in shards.values()))


def hash_keys(keys: list[str], seed: int) -> npt.NDArray[np.uint64]:
    """xxh3_64 of each key under the seed, (keys,)."""
    return np.array([xxhash.xxh3_64_intdigest(key.encode(), seed) for key in keys], np.uint64)


def assign(rows: pa.Table, shards: Mapping[str, range], seed: int) -> pa.Table:
    """The rows with the columns of `ASSIGNED`. Rejected ones are spread over all shards by the hash of their source."""
    rejected = rows.filter(pc.is_valid(rows["reason"]))
    first, stop = span(shards).start, span(shards).stop
    hashes = hash_keys(rejected["source"].to_pylist(), seed)
    parts = [_with_columns(rejected, (hashes % np.uint64(stop - first)).astype(np.int64) + first, hashes)]
    for split, numbers in shards.items():
        own = rows.filter(pc.and_(pc.is_null(rows["reason"]), pc.equal(rows["split"], split)))
        hashes = hash_keys(own["key"].to_pylist(), seed)
        # The upper half of the hash times the number of ranges, by 2^32: the range it falls into, in whole numbers.
        within = (hashes >> np.uint64(32)) * np.uint64(len(numbers)) >> np.uint64(32)
        parts.append(_with_columns(own, within.astype(np.int64) + numbers.start, hashes))
    return pa.concat_tables(parts)


def deal(rows: pa.Table, shards: Mapping[str, range], seed: int, num_buckets: int) -> tuple[pa.Table, ...]:
    """The assigned rows, split into buckets of neighbouring shards."""
    assigned = assign(rows, shards, seed)
    first, stop = span(shards).start, span(shards).stop
    bucket = bucket_of(assigned["shard"].to_numpy() - first, stop - first, num_buckets)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    return tuple(assigned.take(order[start:end]) for start, end in pairwise(ends))


def bucket_of(shard: npt.NDArray[np.int64], num_shards: int, num_buckets: int) -> npt.NDArray[np.int64]:
    """The bucket of each shard, (shards,), counted from 0: equal runs of shards."""
    return shard * num_buckets // num_shards


def _with_columns(rows: pa.Table, shard: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64]) -> pa.Table:
    for (name, kind), column in zip(ASSIGNED, (shard, hashes), strict=True):
        rows = rows.append_column(name, pa.array(column, kind))
    return rows
