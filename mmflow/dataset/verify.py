"""Whether a committed dataset is what its manifest says: every line that comes back names a shard and what is wrong.

Readers of tars are of no help here: at a damaged header `tarfile` ends the archive in silence, and so do webdataset and
Ray Data; seven of twenty samples then look like a dataset.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

from mmflow.core.artifacts import MANIFEST
from mmflow.core.errors import CorruptArtifactError, MmflowError
from mmflow.core.storage import filesystem, join, positioned_reader
from mmflow.dataset.index import MEMBERS, read_column, read_index_and_commit
from mmflow.dataset.keys import repeated_keys
from mmflow.dataset.manifest import ShardInfo, fingerprint_of, index_uri, quarantine_files
from mmflow.dataset.members import check_members, layout_of, pass_over
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.samples import read_texts
from mmflow.imaging.decode import decode_source
from mmflow.imaging.header import probe
from mmflow.sources.reasons import Rejected
from mmflow.sources.records import KEY

DECODED_SAMPLES = 256
MAX_LINES_PER_SHARD = 10  # one lost byte can put every later sample wrong; ten of them tell as much
MAX_THREADS = 8  # each holds one shard's index and one block of its tar
WHOLE_KEY = rf"\A(?:{KEY.pattern})\z"
NEVER_NULL = ("key", "row", "image_extension", "width", "height")


def verify_dataset(uri: str, *, decoded_samples: int | None = DECODED_SAMPLES) -> list[str]:
    """What is wrong with the dataset, a line each; empty where nothing is.

    Every byte of every tar is read, and every header. Images and captions are also decoded, of `decoded_samples`
    samples spread over the dataset, or of all where it is None. Memory: a shard's index a thread, and 8 bytes a key.
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


def check_totals(dataset: Dataset, shards: Sequence[ShardInfo]) -> list[str]:
    """The manifest against itself and against the rows in quarantine."""
    place = join(dataset.uri, MANIFEST)
    totals = dataset.manifest["totals"]
    samples: Counter[str] = Counter()
    for shard in shards:
        samples[shard.split] += shard.samples
    reasons = count_reasons(dataset)
    expected = {
        "samples": samples.total(),
        "bytes": sum(shard.bytes for shard in shards),
        "splits": dict(samples),
        "quarantined": reasons.total(),
        "reasons": dict(reasons),
        "records": samples.total() + reasons.total(),
    }
    wrong = [
        f"{place}: totals.{name} is {totals.get(name)!r}, its shards and quarantine have {value!r}"
        for name, value in expected.items()
        if totals.get(name) != value
    ]
    if dataset.fingerprint != fingerprint_of(sorted(shards, key=lambda shard: int(shard.name))):
        wrong.append(f"{place}: the fingerprint is not that of its shards")
    return wrong


def count_reasons(dataset: Dataset) -> Counter[str]:
    """The rows in quarantine by their reason, a file at a time."""
    reasons: Counter[str] = Counter()
    for uri in quarantine_files(dataset.uri):
        system, path = filesystem(uri)
        with system.open_input_file(path) as stream:
            try:
                column = pq.ParquetFile(stream).read(columns=["reason"])["reason"]
            except (pa.ArrowException, KeyError) as error:
                raise CorruptArtifactError(f"{uri}: not a table of rejected records ({error})") from error
        for count in pc.value_counts(column).to_pylist():
            reasons[str(count["values"])] += count["counts"]
    return reasons


def check_shard(dataset: Dataset, shard: ShardInfo, decoded_rows: Sequence[int]) -> Iterator[str]:
    """The tar and the index of a shard, against the manifest and each other."""
    place, index_place = dataset.tar_uri(shard), index_uri(dataset.uri, shard.name)
    ours = not dataset.adopted
    try:
        index, commit = read_index_and_commit(index_place)
        if (commit.bytes, commit.checksum, commit.samples) != (shard.bytes, shard.checksum, shard.samples):
            yield f"{index_place}: belongs to another tar than the manifest's"
        if index.num_rows != shard.samples:
            yield f"{place}: {index.num_rows} rows in the index, {shard.samples} samples in the manifest"
        required = (*NEVER_NULL, *(f"{member}_{field}" for member in MEMBERS for field in ("offset", "bytes", "xxh3")))
        if nulls := [name for name in required if index[name].null_count]:
            yield f"{index_place}: {', '.join(nulls)} with empty cells"
            return
        if not np.array_equal(index["row"].to_numpy(), np.arange(index.num_rows)):
            yield f"{index_place}: rows are not counted from 0"
        if ours:
            yield from check_keys(place, index)
        layout = layout_of(index, ours=ours)
        passed = pass_over(place, layout)
        if (passed.bytes, passed.checksum) != (shard.bytes, shard.checksum):
            found, wanted = f"{passed.bytes} bytes, {passed.checksum}", f"{shard.bytes} bytes, {shard.checksum}"
            yield f"{place}: {found}; the manifest has {wanted}"
        if not passed.sound:
            yield from check_members(place, layout)
        yield from check_bodies(place, index, decoded_rows)
    except (MmflowError, OSError) as error:
        yield f"{place}: {error}" if place not in str(error) else str(error)


def check_keys(place: str, index: pa.Table) -> Iterator[str]:
    """The form of each key. Those of adopted tars are as others wrote them."""
    misshapen = pc.invert(pc.match_substring_regex(index["key"], WHOLE_KEY))
    for row in np.flatnonzero(misshapen.to_numpy()).tolist():
        key = index["key"][row].as_py()
        yield f"{place}: row {row}: key {key!r} is not of lower-case letters, digits, - and _, at most 80"


def check_repeats(dataset: Dataset, shards: Sequence[ShardInfo]) -> Iterator[tuple[int, str]]:
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


def check_bodies(place: str, index: pa.Table, rows: Sequence[int]) -> Iterator[str]:
    """The members of some rows, hashed and decoded."""
    chosen = index.take(pa.array([row for row in rows if row < index.num_rows], pa.int64()))
    read = positioned_reader(place) if chosen.num_rows else None
    for entry in chosen.to_pylist():
        assert read is not None
        where = f"{place}: row {entry['row']} ({entry['key']})"
        bodies = {}
        for member in MEMBERS:
            bodies[member] = read(entry[f"{member}_bytes"], entry[f"{member}_offset"])
            if xxhash.xxh3_64_intdigest(bodies[member]) != entry[f"{member}_xxh3"]:
                yield f"{where}: {member} is not what was written"
        images = [bodies["image"]]
        for number, frame in enumerate(entry["frames"] or (), 1):
            images.append(read(frame["bytes"], frame["offset"]))
            if xxhash.xxh3_64_intdigest(images[-1]) != frame["xxh3"]:
                yield f"{where}: frame {number} is not what was written"
        try:
            for image in images:
                header = probe(image)
                decode_source(image, header, side=max(header.width, header.height))
                if (header.width, header.height) != (entry["width"], entry["height"]):
                    size = f"{header.width}×{header.height}"
                    yield f"{where}: the image is {size}, the index has {entry['width']}×{entry['height']}"
            captions, counted = len(read_texts(bodies["txt"], bodies["json"])[0]), len(entry["languages"] or ())
            if captions != counted:
                yield f"{where}: captions: {captions}, the index has {counted}"
        except Rejected as rejected:
            yield f"{where}: {rejected.reason}: {rejected.detail}"
        except (ValueError, RecursionError) as error:
            yield f"{where}: {error}"


def check_strays(dataset: Dataset, shards: Sequence[ShardInfo]) -> list[str]:
    """Tars and indexes that the manifest does not know: a glob over the directory would train on them."""
    wrong = []
    for folder, extension in (("shards", ".tar"), ("index", ".parquet")):
        names = {shard.name + extension for shard in shards}
        system, path = filesystem(join(dataset.uri, folder))
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        files = {info.base_name for info in found if info.is_file and not info.base_name.startswith(".")}
        wrong += [
            f"{join(dataset.uri, folder, name)}: not in the manifest; delete it" for name in sorted(files - names)
        ]
    return wrong
