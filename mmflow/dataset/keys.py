"""Which keys of a dataset come twice, when there are too many to hold them.

Eight bytes a key, and never more than `KEYS_PER_PASS` of them (1 GiB): a larger dataset is gone through several times,
each time for another part of the hashes. A Python dict of the keys themselves takes about 200 bytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

KEYS_PER_PASS = 1 << 27
OPEN_KEYS = 8  # shards whose keys are at hand while repeats are looked at

Hashes = NDArray[np.uint64]  # (rows,)


class Repeat(NamedTuple):
    """A row whose key an earlier row has; shards by their number in the sequence given."""

    shard: int
    row: int
    key: str
    first_shard: int
    first_row: int


def repeated_keys(
    keys_of: Callable[[int], pa.Array], sizes: Sequence[int], *, per_pass: int = KEYS_PER_PASS
) -> Iterator[Repeat]:
    """Every row of every shard whose key came before; `keys_of(shard)` is read anew on every pass.

    `sizes` are the shards' numbers of rows. Ordered by shard and row within a pass.
    """
    num_passes = max(1, -(-sum(sizes) // per_pass))
    shards = range(len(sizes))
    keys = lru_cache(maxsize=OPEN_KEYS)(lambda shard: keys_of(shard).to_pylist())

    def part(shard: int, number: int) -> tuple[Hashes, NDArray[np.intp]]:
        hashes = hash_texts(keys_of(shard))
        rows = np.flatnonzero((hashes >> np.uint64(32)) % np.uint64(num_passes) == number)
        return hashes[rows], rows

    for number in range(num_passes):
        twice = repeated_values(part(shard, number)[0] for shard in shards)
        if not len(twice):
            continue
        first = np.full((len(twice), 2), -1, np.int64)  # (values, shard and row) of each value's first row
        for shard in shards:
            hashes, rows = part(shard, number)
            found = np.isin(hashes, twice)
            for value, row in zip(np.searchsorted(twice, hashes[found]).tolist(), rows[found].tolist(), strict=True):
                first_shard, first_row = first[value].tolist()
                if first_shard < 0:
                    first[value] = shard, row
                elif keys(shard)[row] == keys(first_shard)[first_row]:
                    yield Repeat(shard, row, keys(shard)[row], first_shard, first_row)


def repeated_values(parts: Iterable[Hashes]) -> Hashes:
    """The values that come more than once, sorted."""
    values = np.concatenate([np.empty(0, np.uint64), *parts])
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def count_repeats(hashes_of: Callable[[int], Hashes], num_shards: int, *, num_passes: int = 1) -> int:
    """How many values of all shards came before."""
    repeats = 0
    for number in range(num_passes):
        parts = [np.empty(0, np.uint64)]
        for shard in range(num_shards):
            hashes = hashes_of(shard)
            parts.append(hashes[(hashes >> np.uint64(32)) % np.uint64(num_passes) == number])
        values = np.concatenate(parts)
        values.sort()
        repeats += int((values[1:] == values[:-1]).sum())
    return repeats


def hash_texts(texts: pa.Array) -> Hashes:
    """xxh3_64 of each text's UTF-8; of nothing where it is null."""
    encoded = texts.cast(pa.binary()).to_pylist()
    return np.fromiter((xxhash.xxh3_64_intdigest(text or b"") for text in encoded), np.uint64, len(encoded))
