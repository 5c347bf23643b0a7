"""Whether a committed dataset is what its manifest says: one line for each thing that is wrong, naming the shard.

Tar readers are no help here: `tarfile`, and with it webdataset and Ray Data, stops silently at a damaged header, and
seven of twenty samples then look like a dataset.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from mmflow.core.artifacts import MANIFEST
from mmflow.core.errors import MmflowError
from mmflow.core.storage import join, positioned_reader
from mmflow.dataset.format import (
    MEMBERS,
    CommittedShards,
    ShardInfo,
    fingerprint_of,
    index_uri,
    list_folder,
    quarantine_files,
    read_column,
    read_index,
    totals_of,
)
from mmflow.dataset.opened import open_dataset
from mmflow.dataset.reader import read_texts
from mmflow.dataset.tar import check_members, layout_of, pass_over
from mmflow.imaging.decode import decode_source
from mmflow.imaging.header import probe
from mmflow.sources.reasons import Rejected
from mmflow.sources.records import KEY

DECODED_SAMPLES = 256
MAX_LINES_PER_SHARD = 10  # one lost byte can make every later sample wrong, and ten of them say as much
MAX_THREADS = 8  # each holds one shard's index and one block of its tar
WHOLE_KEY = rf"\A(?:{KEY.pattern})\z"
NEVER_NULL = (
    *("key", "row", "image_extension", "width", "height"),
    *(f"{member}_{field}" for member in MEMBERS for field in ("offset", "bytes", "xxh3")),
)
KEYS_PER_PASS = 1 << 27  # 1 GiB of hashes: a larger dataset is read several times, each time for a part of them
OPEN_KEYS = 8  # shards with their keys in memory while repeats are looked at

Hashes = NDArray[np.uint64]  # (rows,)


def verify_dataset(uri: str, *, decoded_samples: int | None = DECODED_SAMPLES) -> list[str]:
    """What is wrong with the dataset, one line each; empty if nothing is.

    Every byte of every tar is read, and every header. Images and captions are also decoded, of `decoded_samples`
    samples spread over the dataset, or of all samples if it is None. Memory: a shard's index per thread, and 8 bytes
    per key.
    """
    try:
        dataset = open_dataset(uri)
        shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
        wrong = check_totals(dataset, shards)
    except MmflowError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError) as error:
        return [f"{join(uri, MANIFEST)}: not a dataset's manifest ({type(error).__name__}: {error})"]
    sizes = [shard.samples for shard in shards]
    step = 1 if decoded_samples is None else max(1, sum(sizes) // max(1, decoded_samples))
    starts = [0, *accumulate(sizes)]

    def check(number: int) -> list[str]:
        rows = range(0) if decoded_samples == 0 else range(-starts[number] % step, sizes[number], step)
        return list(check_shard(dataset, shards[number], rows))

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        lines_of_shard = list(threads.map(check, range(len(shards))))
    for number, line in check_repeats(dataset, shards):
        lines_of_shard[number].append(line)
    for shard, lines in zip(shards, lines_of_shard, strict=True):
        wrong += lines[:MAX_LINES_PER_SHARD]
        if len(lines) > MAX_LINES_PER_SHARD:
            wrong.append(f"{dataset.tar_uri(shard)}: and {len(lines) - MAX_LINES_PER_SHARD} more")
    return wrong + check_strays(dataset, shards)


def check_totals(dataset: CommittedShards, shards: Sequence[ShardInfo]) -> list[str]:
    """The manifest against itself and against the rows in quarantine."""
    place = join(dataset.uri, MANIFEST)
    totals = dataset.manifest["totals"]
    reasons: Counter[str] = Counter()
    for uri in quarantine_files(dataset.uri):
        for count in pc.value_counts(read_column(uri, "reason")).to_pylist():
            reasons[str(count["values"])] += count["counts"]
    wrong = [
        f"{place}: totals.{name} is {totals.get(name)!r}, its shards and quarantine have {value!r}"
        for name, value in totals_of(shards, reasons).items()
        if totals.get(name) != value
    ]
    if dataset.fingerprint != fingerprint_of(sorted(shards, key=lambda shard: int(shard.name))):
        wrong.append(f"{place}: the fingerprint is not that of its shards")
    return wrong


def check_shard(dataset: CommittedShards, shard: ShardInfo, decoded_rows: Sequence[int]) -> Iterator[str]:
    """The tar and the index of a shard, against the manifest and each other."""
    place, index_place = dataset.tar_uri(shard), index_uri(dataset.uri, shard.name)
    ours = not dataset.adopted
    try:
        index, commit = read_index(index_place)
        if (commit.bytes, commit.checksum, commit.samples) != (shard.bytes, shard.checksum, shard.samples):
            yield f"{index_place}: belongs to another tar than the manifest's"
        if index.num_rows != shard.samples:
            yield f"{place}: {index.num_rows} rows in the index, {shard.samples} samples in the manifest"
        if nulls := [name for name in NEVER_NULL if index[name].null_count]:
            yield f"{index_place}: {', '.join(nulls)} with empty cells"
            return
        if not np.array_equal(index["row"].to_numpy(), np.arange(index.num_rows)):
            yield f"{index_place}: rows are not counted from 0"
        if ours:  # the keys of adopted tars are as others wrote them
            well_formed = pc.match_substring_regex(index["key"], WHOLE_KEY).to_numpy()
            for row in np.flatnonzero(~well_formed).tolist():
                key = index["key"][row].as_py()
                yield f"{place}: row {row}: key {key!r} is not lower-case letters, digits, - and _, at most 80"
        layout = layout_of(index, ours=ours)
        passed = pass_over(place, layout)
        if (passed.bytes, passed.checksum) != (shard.bytes, shard.checksum):
            found, expected = f"{passed.bytes} bytes, {passed.checksum}", f"{shard.bytes} bytes, {shard.checksum}"
            yield f"{place}: {found}; the manifest has {expected}"
        if not passed.sound:
            yield from check_members(place, layout)
        yield from check_bodies(place, index, decoded_rows)
    except (MmflowError, OSError) as error:
        yield f"{place}: {error}" if place not in str(error) else str(error)


def check_bodies(place: str, index: pa.Table, rows: Sequence[int]) -> Iterator[str]:
    """The members of some rows, hashed and decoded."""
    chosen = index.take(pa.array([row for row in rows if row < index.num_rows], pa.int64()))
    if not chosen.num_rows:
        return
    read = positioned_reader(place)
    for entry in chosen.to_pylist():
        where = f"{place}: row {entry['row']} ({entry['key']})"
        parts = {
            member: (entry[f"{member}_bytes"], entry[f"{member}_offset"], entry[f"{member}_xxh3"]) for member in MEMBERS
        }
        for number, frame in enumerate(entry["frames"] or (), 1):
            parts[f"frame {number}"] = (frame["bytes"], frame["offset"], frame["xxh3"])
        bodies = {name: read(size, offset) for name, (size, offset, _) in parts.items()}
        for name, body in bodies.items():
            if xxhash.xxh3_64_intdigest(body) != parts[name][2]:
                yield f"{where}: {name} is not what was written"
        txt, fields = bodies.pop("txt"), bodies.pop("json")
        try:
            for image in bodies.values():
                header = probe(image)
                decode_source(image, header, side=max(header.width, header.height))
                if (header.width, header.height) != (entry["width"], entry["height"]):
                    size = f"{header.width}×{header.height}"
                    yield f"{where}: the image is {size}, the index has {entry['width']}×{entry['height']}"
            captions, counted = len(read_texts(txt, fields)[0]), len(entry["languages"] or ())
            if captions != counted:
                yield f"{where}: captions: {captions}, the index has {counted}"
        except Rejected as rejected:
            yield f"{where}: {rejected.reason}: {rejected.detail}"
        except (ValueError, RecursionError) as error:
            yield f"{where}: {error}"


def check_strays(dataset: CommittedShards, shards: Sequence[ShardInfo]) -> list[str]:
    """Tars and indexes that are not in the manifest: a glob over the directory would train on them."""
    wrong = []
    for folder, extension in (("shards", ".tar"), ("index", ".parquet")):
        strays = list_folder(dataset.uri, folder).keys() - {shard.name + extension for shard in shards}
        names = sorted(name for name in strays if not name.startswith("."))
        wrong += [f"{join(dataset.uri, folder, name)}: not in the manifest; delete it" for name in names]
    return wrong


def check_repeats(dataset: CommittedShards, shards: Sequence[ShardInfo]) -> Iterator[tuple[int, str]]:
    """(number of the shard, line) of every key that an earlier row of the dataset has."""

    def keys_of(number: int) -> pa.Array:
        try:
            return read_column(index_uri(dataset.uri, shards[number].name), "key")
        except MmflowError:  # reported with its shard
            return pa.array([], pa.string())

    for repeat in repeated_keys(keys_of, [shard.samples for shard in shards]):
        place = dataset.tar_uri(shards[repeat.shard])
        first = f"shard {shards[repeat.first_shard].name}, row {repeat.first_row}"
        yield repeat.shard, f"{place}: row {repeat.row}: key {repeat.key!r} is also in {first}"


# --- repeated keys: 8 bytes each, where a dict of the keys themselves would take about 200 ----------------------------


class Repeat(NamedTuple):
    """A row with a key that an earlier row has; shards are numbered as in the sequence given."""

    shard: int
    row: int
    key: str
    first_shard: int
    first_row: int


def repeated_keys(
    keys_of: Callable[[int], pa.Array], sizes: Sequence[int], *, per_pass: int = KEYS_PER_PASS
) -> Iterator[Repeat]:
    """Every row of every shard with a key that came before, ordered by shard and row within a pass.

    `keys_of(shard)` is called again on every pass. `sizes` are the shards' numbers of rows.
    """
    num_passes = max(1, -(-sum(sizes) // per_pass))
    shards = range(len(sizes))
    keys = lru_cache(maxsize=OPEN_KEYS)(lambda shard: keys_of(shard).to_pylist())

    def part(shard: int, number: int) -> tuple[Hashes, NDArray[np.intp]]:
        hashes = hash_texts(keys_of(shard))
        rows = np.flatnonzero((hashes >> np.uint64(32)) % np.uint64(num_passes) == number)
        return hashes[rows], rows

    for number in range(num_passes):
        repeated = repeated_values(part(shard, number)[0] for shard in shards)
        if not len(repeated):
            continue
        first = np.full((len(repeated), 2), -1, np.int64)  # (values, shard and row) of each value's first row
        for shard in shards:
            hashes, rows = part(shard, number)
            hit = np.isin(hashes, repeated)
            for value, row in zip(np.searchsorted(repeated, hashes[hit]).tolist(), rows[hit].tolist(), strict=True):
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
        repeats += len(values) - len(np.unique(values))
    return repeats


def hash_texts(texts: pa.Array) -> Hashes:
    """xxh3_64 of each text's UTF-8; of nothing for null."""
    encoded = texts.cast(pa.binary()).to_pylist()
    return np.fromiter((xxhash.xxh3_64_intdigest(text or b"") for text in encoded), np.uint64, len(encoded))
