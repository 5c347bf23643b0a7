"""Whether a committed dataset is what its manifest says: every line that comes back names a shard and what is wrong.

Readers of tars are of no help here: at a damaged header `tarfile` ends the archive in silence, and so do webdataset and
Ray Data; seven of twenty samples then look like a dataset.
"""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

from mmflow.artifacts import MANIFEST, exists, filesystem, join, local_path, read_bytes
from mmflow.errors import CorruptArtifactError, MmflowError
from mmflow.ingest.images import decode, probe
from mmflow.ingest.reasons import Rejected
from mmflow.ingest.records import KEY
from mmflow.shards.dataset import Dataset, ShardInfo, fingerprint_of, index_uri, open_dataset
from mmflow.shards.index import MEMBERS, read_index_and_commit
from mmflow.shards.tar import scan

DECODED_SAMPLES = 256
DIGEST_BYTES = 16 << 20
MAX_LINES_PER_SHARD = 10  # one lost byte can put every later sample wrong; ten of them tell as much


def verify_dataset(uri: str, *, decoded_samples: int | None = DECODED_SAMPLES) -> list[str]:
    """What is wrong with the dataset, a line each; empty where nothing is.

    Every byte of every tar is read. Images and captions are also decoded, of `decoded_samples` samples spread over the
    dataset, or of all where it is None.
    """
    try:
        dataset = open_dataset(uri)
        shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
        wrong = check_totals(dataset, shards)
    except MmflowError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError) as error:
        return [f"{join(uri, MANIFEST)}: not a dataset's manifest ({type(error).__name__}: {error})"]
    num_samples = sum(shard.samples for shard in shards)
    step = 1 if decoded_samples is None else max(1, num_samples // max(1, decoded_samples))
    shard_of_key: dict[str, str] = {}
    for shard in shards:
        found = [] if decoded_samples == 0 else list(range(0, shard.samples, step))
        lines = list(check_shard(dataset, shard, shard_of_key, decoded_rows=found))
        wrong += lines[:MAX_LINES_PER_SHARD]
        if len(lines) > MAX_LINES_PER_SHARD:
            wrong.append(f"{dataset.tar_uri(shard)}: and {len(lines) - MAX_LINES_PER_SHARD} more")
    return wrong + check_strays(dataset, shards)


def check_totals(dataset: Dataset, shards: list[ShardInfo]) -> list[str]:
    """The manifest against itself and against the rows in quarantine."""
    place = join(dataset.uri, MANIFEST)
    totals = dataset.manifest["totals"]
    samples: Counter[str] = Counter()
    for shard in shards:
        samples[shard.split] += shard.samples
    quarantined = sum(_num_rows(path) for path in _files(dataset.uri, "quarantine").values())
    expected = {
        "samples": samples.total(),
        "bytes": sum(shard.bytes for shard in shards),
        "splits": dict(samples),
        "quarantined": quarantined,
        "records": samples.total() + quarantined,
    }
    wrong = [
        f"{place}: totals.{name} is {totals.get(name)!r}, its shards and quarantine have {value!r}"
        for name, value in expected.items()
        if totals.get(name) != value
    ]
    if dataset.fingerprint != fingerprint_of(sorted(shards, key=lambda shard: shard.name)):
        wrong.append(f"{place}: the fingerprint is not that of its shards")
    return wrong


def check_shard(
    dataset: Dataset, shard: ShardInfo, shard_of_key: dict[str, str], *, decoded_rows: list[int]
) -> Iterator[str]:
    """The tar and the index of a shard, against the manifest and each other; adds its keys to `shard_of_key`."""
    place = dataset.tar_uri(shard)
    try:
        index, commit = read_index_and_commit(index_uri(dataset.uri, shard.name))
        with _mapped(place) as tar:
            checksum = xxhash.xxh3_128(tar).hexdigest()
            if (len(tar), checksum) != (shard.bytes, shard.checksum):
                yield f"{place}: {len(tar)} bytes, {checksum}; the manifest has {shard.bytes} bytes, {shard.checksum}"
            if (commit.bytes, commit.checksum, commit.samples) != (shard.bytes, shard.checksum, shard.samples):
                yield f"{index_uri(dataset.uri, shard.name)}: belongs to another tar than the manifest's"
            if index.num_rows != shard.samples:
                yield f"{place}: {index.num_rows} rows in the index, {shard.samples} samples in the manifest"
            yield from check_keys(place, shard, index, shard_of_key)
            yield from check_members(place, tar, index)
            yield from check_bodies(place, tar, index, decoded_rows)
    except (MmflowError, OSError) as error:
        yield f"{place}: {error}" if place not in str(error) else str(error)


def check_keys(place: str, shard: ShardInfo, index: pa.Table, shard_of_key: dict[str, str]) -> Iterator[str]:
    """The form of each key, and that no sample of the dataset had it before."""
    for row, key in enumerate(index["key"].to_pylist()):
        if not KEY.fullmatch(key):
            yield f"{place}: row {row}: key {key!r} is not of lower-case letters, digits, - and _, at most 80"
        if key in shard_of_key:
            yield f"{place}: row {row}: key {key!r} is also in shard {shard_of_key[key]}"
        shard_of_key[key] = shard.name


def check_members(place: str, tar: bytes | mmap.mmap, index: pa.Table) -> Iterator[str]:
    """The tar's headers against the index: every member there, in order, at its offset, of its size, and no other."""
    offsets = [index[f"{member}_offset"].to_pylist() for member in MEMBERS]
    sizes = [index[f"{member}_bytes"].to_pylist() for member in MEMBERS]
    members = scan(tar)
    for row, (key, extension) in enumerate(
        zip(index["key"].to_pylist(), index["image_extension"].to_pylist(), strict=True)
    ):
        for number, suffix in enumerate((extension, "txt", "json")):
            expected = (f"{key}.{suffix}", offsets[number][row], sizes[number][row])
            found = next(members, None)
            if found is None:
                yield f"{place}: ends before {expected[0]} (row {row})"
                return
            if found != expected:
                yield f"{place}: row {row}: {tuple(found)} in the tar, {expected} in the index (name, offset, bytes)"
    if (extra := next(members, None)) is not None:
        yield f"{place}: {extra.name} at byte {extra.offset} is not in the index"


def check_bodies(place: str, tar: bytes | mmap.mmap, index: pa.Table, rows: list[int]) -> Iterator[str]:
    """The members of some rows, hashed and decoded."""
    for entry in index.take(pa.array([row for row in rows if row < index.num_rows], pa.int64())).to_pylist():
        where = f"{place}: row {entry['row']} ({entry['key']})"
        bodies = {}
        for member in MEMBERS:
            start = entry[f"{member}_offset"]
            bodies[member] = tar[start : start + entry[f"{member}_bytes"]]
            if xxhash.xxh3_64_intdigest(bodies[member]) != entry[f"{member}_xxh3"]:
                yield f"{where}: {member} is not what was written"
        try:
            header = probe(bodies["image"])
            image = decode(bodies["image"], header, side=max(header.width, header.height))
            json.loads(bodies["json"])
            bodies["txt"].decode()
        except Rejected as rejected:
            yield f"{where}: {rejected.reason}: {rejected.detail}"
        except ValueError as error:
            yield f"{where}: {error}"
        else:
            if image.shape != (entry["height"], entry["width"], 3):
                yield f"{where}: the image is {image.shape}, the index has {entry['width']}×{entry['height']}"


def check_strays(dataset: Dataset, shards: list[ShardInfo]) -> list[str]:
    """Tars and indexes that the manifest does not know: a glob over the directory would train on them."""
    wrong = []
    for folder, extension in (("shards", ".tar"), ("index", ".parquet")):
        names = {shard.name + extension for shard in shards}
        strays = sorted(set(_files(dataset.uri, folder)) - names)
        wrong += [f"{join(dataset.uri, folder, name)}: not in the manifest; delete it" for name in strays]
    return wrong


def _files(uri: str, folder: str) -> dict[str, str]:
    """Base name → URI of the files in a folder of the dataset, hidden ones left out."""
    system, path = filesystem(join(uri, folder))
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = sorted(info.base_name for info in found if info.is_file and not info.base_name.startswith("."))
    return {name: join(uri, folder, name) for name in names}


def _num_rows(uri: str) -> int:
    system, path = filesystem(uri)
    with system.open_input_file(path) as stream:
        try:
            return int(pq.read_metadata(stream).num_rows)
        except pa.ArrowException as error:
            raise CorruptArtifactError(f"{uri}: not Parquet ({error})") from error


@contextmanager
def _mapped(uri: str) -> Iterator[bytes | mmap.mmap]:
    """A tar's bytes: mapped where it is local, fetched whole where it is not."""
    path = local_path(uri)
    if path is None or not exists(uri) or path.stat().st_size == 0:
        yield read_bytes(uri)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped
