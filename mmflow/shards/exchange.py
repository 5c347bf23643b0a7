"""Which shard a record belongs to, as a pure function of the record: the global shuffle, without a global sort.

The order of a dataset is the order of its keys' hashes under a seed. The hashes of each split are cut into equal
ranges, one a shard; within a shard samples stand in the order of their hashes. So a record's place needs
no other record, and the same records make the same shards however they were spread over files, blocks and workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

# Rows of a block, split's ranges known: `RECORDS` and where each goes. A claim stands for a record of another split.
ASSIGNED = (("shard", pa.int64()), ("hash", pa.uint64()), ("claim", pa.bool_()))


def count_splits(records: pa.Table) -> dict[str | None, int]:
    """How many good records each split has; under None, how many were rejected when they were read."""
    split = pc.if_else(pc.is_null(records["reason"]), records["split"], pa.scalar(None, pa.string()))
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(split).to_pylist()}


def shards_of_splits(num_records: Mapping[str, int], samples_per_shard: int) -> dict[str, range]:
    """Each split's shards by number: counted on over the splits in the order of their names."""
    shards = {}
    first = 0
    for split in sorted(num_records):
        num_shards = -(-num_records[split] // samples_per_shard)
        shards[split] = range(first, first + num_shards)
        first += num_shards
    return shards


def hash_keys(keys: list[str], seed: int) -> npt.NDArray[np.uint64]:
    """xxh3_64 of each key under the seed, (keys,)."""
    return np.array([xxhash.xxh3_64_intdigest(key.encode(), seed) for key in keys], np.uint64)


def assign(records: pa.Table, shards: Mapping[str, range], seed: int) -> pa.Table:
    """The records with the columns of `ASSIGNED`, and claims.

    One key may stand in two splits, whose shards never meet. So each record also sends a claim (key and place, nothing
    else) to the shard that would hold its key in every other split: each shard then knows all records of its keys, and
    every shard names the same survivor.
    """
    rejected = records.filter(pc.is_valid(records["reason"]))
    good = records.filter(pc.is_null(records["reason"]))
    hashes = hash_keys(good["key"].to_pylist(), seed)
    num_shards = max(numbers.stop for numbers in shards.values())
    sources = hash_keys(rejected["source"].to_pylist(), seed)
    parts = [_with_columns(rejected, (sources % np.uint64(num_shards)).astype(np.int64), sources, claim=False)]
    for split, numbers in shards.items():
        # The upper half of the hash times the number of ranges, by 2^32: the range it falls into, in whole numbers.
        within = (hashes >> np.uint64(32)) * np.uint64(len(numbers)) >> np.uint64(32)
        shard = within.astype(np.int64) + numbers.start
        own = pc.equal(good["split"], split).to_numpy(zero_copy_only=False).astype(bool)
        parts.append(_with_columns(good.filter(pa.array(own)), shard[own], hashes[own], claim=False))
        claims = good.select(["place", "key"]).filter(pa.array(~own))
        parts.append(_with_columns(claims, shard[~own], hashes[~own], claim=True))
    return pa.concat_tables(parts, promote_options="default")


def deal(
    records: pa.Table, shards: Mapping[str, range], seed: int, num_buckets: int
) -> pa.Table | tuple[pa.Table, ...]:
    """The assigned records, split into buckets of neighbouring shards.

    A single bucket comes bare, as Ray wants it of a task of one result.
    """
    assigned = assign(records, shards, seed)
    num_shards = max(numbers.stop for numbers in shards.values())
    bucket = bucket_of(assigned["shard"].to_numpy(), num_shards, num_buckets)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    parts = tuple(assigned.take(order[start:end]) for start, end in pairwise(ends))
    return parts[0] if num_buckets == 1 else parts


def bucket_of(shard: npt.NDArray[np.int64], num_shards: int, num_buckets: int) -> npt.NDArray[np.int64]:
    """The bucket of each shard, (shards,): equal runs of shard numbers."""
    return shard * num_buckets // num_shards


def _with_columns(
    records: pa.Table, shard: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64], *, claim: bool
) -> pa.Table:
    values = (shard, hashes, np.full(len(shard), claim))
    for (name, kind), column in zip(ASSIGNED, values, strict=True):
        records = records.append_column(name, pa.array(column, kind))
    return records
