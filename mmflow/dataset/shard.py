"""One open shard: a row to its files by positioned reads, checked against the index. Tar headers are not parsed.

The index is packed into flat bytes, because its numbers are looked up for every sample. One `struct` call turns a row's
numbers into Python integers in half a microsecond; numpy's scalars take ten times as long, and lists of Python integers
five times the memory. A row takes 108 bytes and its key, so 64 open shards of 10,000 samples stay under 100 MB.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray
from pyarrow import fs

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.storage import filesystem, local_path
from mmflow.dataset.cache import CachedShard, ShardCache
from mmflow.dataset.format import MEMBERS, CommittedShards, ShardInfo, index_uri, read_columns

SCAN_BYTES = 16 << 20  # read at once from a remote shard by a pass through it: a request costs as much as a megabyte
MEMBER_FIELDS = ("offset", "bytes", "xxh3")
COLUMNS = (
    "key",
    "row",
    "image_extension",
    "caption_tokens",
    *(f"{member}_{field}" for member in MEMBERS for field in MEMBER_FIELDS),
    "frames",
)
# The range that covers everything but the image; offset, bytes and xxh3_64 of image, txt and JSON; where the key is
# among the keys, and its bytes; the number of the extension; the first frame, and how many.
RECORD = np.dtype(
    [
        ("rest_offset", "<i8"),
        ("rest_bytes", "<i8"),
        *((f"{member}_{field}", "<u8" if field == "xxh3" else "<i8") for member in MEMBERS for field in MEMBER_FIELDS),
        *((name, "<u4") for name in ("key_start", "key_bytes", "extension", "first_frame", "num_frames")),
    ]
)
FRAME = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("xxh3", "<u8")])
RECORD_BYTES, FRAME_BYTES = RECORD.itemsize, FRAME.itemsize
UNPACK_RECORD = struct.Struct("<qq" + "qqQ" * len(MEMBERS) + "5I").unpack_from
UNPACK_FRAME = struct.Struct("<qqQ").unpack_from
NOWHERE = np.iinfo(np.int64).max
hash_of = xxhash.xxh3_64_intdigest

Read = Callable[[int, int], bytes]  # (size, offset) → bytes


# --- the packed index -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """The rows of one shard, in the order of its tar."""

    packed: bytes  # a `RECORD` per row
    keys: bytes  # UTF-8, one after another
    extensions: tuple[str, ...]
    frames: bytes  # a `FRAME` per frame after a clip's first
    caption_tokens: NDArray[np.int32]  # (rows,): an estimate for the longest caption

    @property
    def table(self) -> NDArray[np.void]:
        """(rows,) of `RECORD`, without a copy."""
        return np.frombuffer(self.packed, RECORD)


def read_records(dataset: CommittedShards, shard: ShardInfo, *, frames: bool) -> Records:
    """The rows of a shard. Without `frames`, a clip is only its first frame.

    Raises CorruptArtifactError if the index belongs to another tar than the manifest's, or points outside of it.
    """
    uri = index_uri(dataset.uri, shard.name)
    index, commit = read_columns(uri, COLUMNS)
    wrong = ""
    if index.num_rows != shard.samples:
        wrong = f"{index.num_rows} rows, the manifest says {shard.samples}"
    elif (commit.checksum, commit.bytes) != (shard.checksum, shard.bytes):
        wrong = f"belongs to a tar of {commit.bytes} bytes, {commit.checksum}, the manifest's is another"
    elif nulls := [name for name in COLUMNS[:-1] if index[name].null_count]:
        wrong = f"{', '.join(nulls)} with empty cells"
    elif not np.array_equal(index["row"].to_numpy(), np.arange(index.num_rows)):
        wrong = "rows are not counted from 0"
    if not wrong:
        records = pack(index, frames=frames)
        rows = records.table
        outside = np.zeros(len(rows), np.bool_)
        for name in ("image", "rest"):
            offset, size = rows[f"{name}_offset"], rows[f"{name}_bytes"]
            outside |= (offset < 0) | (size < 0) | (offset + size > shard.bytes)
        if not outside.any():
            return records
        wrong = f"row {outside.argmax()} lies outside of its tar of {shard.bytes} bytes"
    raise CorruptArtifactError(f"{uri}: {wrong}; run `mmflow verify {dataset.uri}`")


def pack(index: pa.Table, *, frames: bool) -> Records:
    """The rows of an index with the columns of `COLUMNS`, without nulls."""
    index = index.combine_chunks()
    records = np.zeros(index.num_rows, RECORD)
    for member in MEMBERS:
        for field in MEMBER_FIELDS:
            records[f"{member}_{field}"] = index[f"{member}_{field}"].to_numpy()
    key = index["key"].combine_chunks()
    records["key_bytes"] = pc.binary_length(key).to_numpy(zero_copy_only=False)
    records["key_start"] = np.cumsum(records["key_bytes"]) - records["key_bytes"]
    extension = index["image_extension"].combine_chunks().dictionary_encode()
    records["extension"] = extension.indices.to_numpy(zero_copy_only=False)
    start, end = np.full(len(records), NOWHERE), np.zeros(len(records), np.int64)
    for member in MEMBERS[1:]:
        offset, size = records[f"{member}_offset"], records[f"{member}_bytes"]
        there = size != 0  # a text that an adopted tar lacks has the image's offset, which would be read twice
        np.minimum(start, offset, out=start, where=there)
        np.maximum(end, offset + size, out=end, where=there)
    packed = np.zeros(0, FRAME)
    if frames:
        clips = index["frames"].combine_chunks()
        counts = pc.fill_null(pc.list_value_length(clips), 0).to_numpy(zero_copy_only=False)
        flat = clips.flatten()
        packed = np.zeros(len(flat), FRAME)
        for field in MEMBER_FIELDS:
            packed[field] = flat.field(field).to_numpy(zero_copy_only=False)
        records["num_frames"] = counts
        records["first_frame"] = np.cumsum(counts) - counts
        owners = np.repeat(np.arange(len(records)), counts)
        np.minimum.at(start, owners, packed["offset"])
        np.maximum.at(end, owners, packed["offset"] + packed["bytes"])
    has_rest = end > 0
    records["rest_offset"] = np.where(has_rest, start, records["image_offset"])
    records["rest_bytes"] = np.where(has_rest, end - start, 0)
    return Records(
        packed=records.tobytes(),
        keys="".join(key.to_pylist()).encode(),
        extensions=tuple(extension.dictionary.to_pylist()),
        frames=packed.tobytes(),
        caption_tokens=index["caption_tokens"].to_numpy(),
    )


# --- the open tar -----------------------------------------------------------------------------------------------------


class Members(NamedTuple):
    """A sample's files as they are in the tar, each checked against its hash. An adopted one may lack a text: b""."""

    key: str
    image: bytes
    extension: str
    txt: bytes
    json: bytes
    frames: tuple[bytes, ...]


@dataclass(frozen=True)
class OpenShard:
    """A shard's records and a way to read its tar: from a local file, a cached copy, or the object store."""

    uri: str
    dataset: str  # its URI
    num_rows: int
    records: Records
    read: Read
    prepare: Callable[[int, int], None]  # (offset, size): will be read soon; have it in memory, or the tar in the cache
    is_local: bool
    cached: CachedShard | None = None

    def members(self, row: int, read: Read, *, image: bool = True) -> Members:
        """A row's files. The image is read on its own: cut out of a longer read, its bytes would be copied twice."""
        if not 0 <= row < self.num_rows:
            raise MisuseError(f"{self.uri}: no row {row}; it has {self.num_rows}")
        record = UNPACK_RECORD(self.records.packed, row * RECORD_BYTES)
        try:
            return self._members(row, record, read, image)
        except CorruptArtifactError:
            if self.cached is None or not self.cached.discard_if_altered():
                raise
        return self._members(row, record, read, image)

    def _members(self, row: int, record: tuple[int, ...], read: Read, with_image: bool) -> Members:
        (
            base, rest_bytes,
            image_at, image_bytes, image_xxh3, txt_at, txt_bytes, txt_xxh3, json_at, json_bytes, json_xxh3,
            key_at, key_bytes, extension, first_frame, num_frames,
        ) = record  # fmt: skip
        records = self.records
        key = records.keys[key_at : key_at + key_bytes].decode()
        image = read(image_bytes, image_at) if with_image else b""
        rest = read(rest_bytes, base) if rest_bytes else b""
        txt = rest[txt_at - base : txt_at - base + txt_bytes] if txt_bytes else b""
        body = rest[json_at - base : json_at - base + json_bytes] if json_bytes else b""
        if with_image and hash_of(image) != image_xxh3:
            raise self._corrupt("image", row, key)
        if hash_of(txt) != txt_xxh3:
            raise self._corrupt("txt", row, key)
        if hash_of(body) != json_xxh3:
            raise self._corrupt("json", row, key)
        if not num_frames:
            return Members(key, image, records.extensions[extension], txt, body, ())
        frames = []
        for number in range(num_frames):
            at, size, xxh3 = UNPACK_FRAME(records.frames, (first_frame + number) * FRAME_BYTES)
            frames.append(rest[at - base : at - base + size])
            if hash_of(frames[-1]) != xxh3:
                raise self._corrupt(f"frame {number + 1}", row, key)
        return Members(key, image, records.extensions[extension], txt, body, tuple(frames))

    def key(self, row: int) -> str:
        """A row's key, from the index alone."""
        start, size = self.records.table[row][["key_start", "key_bytes"]]
        return self.records.keys[start : start + size].decode()

    def _corrupt(self, member: str, row: int, key: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"{self.uri}: {member} of row {row} ({key}) is not what was written; run `mmflow verify {self.dataset}`"
        )

    def scanning_read(self) -> Read:
        """A `read` for ascending offsets. From an object store, one long request answers many of them."""
        start, data = 0, b""

        def read(size: int, offset: int) -> bytes:
            nonlocal start, data
            if not start <= offset <= start + len(data) - size:
                start, data = offset, self.read(max(size, SCAN_BYTES), offset)
            return data[offset - start : offset - start + size]

        return self.read if self.is_local else read

    def prepare_rows(self, first_row: int, last_row: int) -> None:
        """Have the rows from the first to the last brought into memory, or the tar into the cache."""
        rows = self.records.table[[first_row, last_row]]
        start = int(min(rows["image_offset"].min(), rows["rest_offset"].min()))
        stop = int(max((rows[f"{part}_offset"] + rows[f"{part}_bytes"]).max() for part in ("image", "rest")))
        self.prepare(start, stop - start)


def open_shard(dataset: CommittedShards, shard: ShardInfo, records: Records, cache: ShardCache | None) -> OpenShard:
    """The shard, ready to read. Raises MissingArtifactError or CorruptArtifactError if its tar is gone or altered."""
    uri = dataset.tar_uri(shard)
    path = local_path(uri)
    opened = partial(OpenShard, uri, dataset.uri, shard.samples, records)
    if path is None and cache is not None:
        copy = cache.shard(uri, shard.checksum, shard.bytes)
        return opened(copy.read, copy.prepare, True, copy)
    try:
        if path is None:
            system, remote = filesystem(uri)
            stream = system.open_input_file(remote)
            check_size(dataset, shard, stream.size())
            # Several threads may read pyarrow's own streams at once, but not those of fsspec.
            guard = threading.Lock() if isinstance(system, fs.PyFileSystem) else contextlib.nullcontext()
            return opened(partial(_read_remote, stream, guard), lambda offset, size: None, False)
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error
    check_size(dataset, shard, os.fstat(file.fileno()).st_size)
    return opened(partial(_read_local, file), partial(_advise, file), True)


def check_size(dataset: CommittedShards, shard: ShardInfo, size: int) -> None:
    """Raises CorruptArtifactError if the size of a shard's tar is not the manifest's."""
    if size != shard.bytes:
        raise CorruptArtifactError(
            f"{dataset.tar_uri(shard)}: {size} bytes, the manifest says {shard.bytes}: it was altered after its "
            f"commit; run `mmflow verify {dataset.uri}`"
        )


def _read_local(file: IO[bytes], size: int, offset: int) -> bytes:
    try:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise CorruptArtifactError(f"{file.name}: byte {offset} cannot be read ({error.strerror})") from error


def _read_remote(stream: Any, guard: AbstractContextManager[Any], size: int, offset: int) -> bytes:
    with guard:
        return bytes(stream.read_at(size, offset))


def _advise(file: IO[bytes], offset: int, size: int) -> None:
    os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
