"""A shard's index packed into flat bytes, because its numbers are looked up for every sample that is read.

One `struct` call makes a row's numbers Python integers in half a microsecond; numpy's scalars cost ten times that, and
lists of Python integers five times the memory. A row takes 108 bytes and its key, so that 64 open shards of 10,000
samples stay under 100 MB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmflow.core.errors import CorruptArtifactError
from mmflow.dataset.index import MEMBERS, read_columns
from mmflow.dataset.manifest import CommittedShards, ShardInfo, index_uri

MEMBER_FIELDS = ("offset", "bytes", "xxh3")
COLUMNS = (
    "key",
    "row",
    "image_extension",
    "caption_tokens",
    *(f"{member}_{field}" for member in MEMBERS for field in MEMBER_FIELDS),
    "frames",
)
# The bytes that everything but the image spans, and where they begin; of image, txt and JSON the offset, bytes and
# xxh3_64; where the key lies among the keys, and its bytes; the number of the extension; the first frame, and how many.
RECORD = np.dtype(
    [
        ("rest_offset", "<i8"),
        ("rest_bytes", "<i8"),
        *((f"{member}_{field}", "<u8" if field == "xxh3" else "<i8") for member in MEMBERS for field in MEMBER_FIELDS),
        *((name, "<u4") for name in ("key_start", "key_bytes", "extension", "first_frame", "num_frames")),
    ]
)
UNPACK_RECORD = struct.Struct("<qq" + "qqQ" * len(MEMBERS) + "5I").unpack_from
FRAME = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("xxh3", "<u8")])
NOWHERE = np.iinfo(np.int64).max
UNPACK_FRAME = struct.Struct("<qqQ").unpack_from


@dataclass(frozen=True)
class Records:
    """The rows of one shard, in the order of its tar."""

    packed: bytes  # `RECORD` a row
    keys: bytes  # UTF-8, one after another
    extensions: tuple[str, ...]
    frames: bytes  # `FRAME` a frame after a clip's first
    caption_tokens: NDArray[np.int32]  # (rows,): an estimate for the longest caption

    def __len__(self) -> int:
        return len(self.packed) // RECORD.itemsize

    @property
    def table(self) -> NDArray[np.void]:
        """(rows,) of `RECORD`, without a copy."""
        return np.frombuffer(self.packed, RECORD)


def read_records(dataset: CommittedShards, shard: ShardInfo, *, frames: bool) -> Records:
    """The rows of a shard; without `frames`, a clip is its first frame alone.

    Raises CorruptArtifactError for an index of another tar than the manifest's, or one that points outside of it.
    """
    uri = index_uri(dataset.uri, shard.name)
    index, commit = read_columns(uri, COLUMNS)
    found = None
    if index.num_rows != shard.samples:
        wrong = f"{index.num_rows} rows, the manifest says {shard.samples}"
    elif (commit.checksum, commit.bytes) != (shard.checksum, shard.bytes):
        wrong = f"belongs to a tar of {commit.bytes} bytes, {commit.checksum}, the manifest's is another"
    elif nulls := [name for name in COLUMNS[:-1] if index[name].null_count]:
        wrong = f"{', '.join(nulls)} with empty cells"
    elif not np.array_equal(index["row"].to_numpy(), np.arange(index.num_rows)):
        wrong = "rows are not counted from 0"
    else:
        found = pack(index, frames=frames)
        outside = np.zeros(len(found), np.bool_)
        for name in ("image", "rest"):
            offset, size = found.table[f"{name}_offset"], found.table[f"{name}_bytes"]
            outside |= (offset < 0) | (size < 0) | (offset + size > shard.bytes)
        wrong = f"row {outside.argmax()} lies outside of its tar of {shard.bytes} bytes" if outside.any() else ""
    if found is None or wrong:
        raise CorruptArtifactError(f"{uri}: {wrong}; run `mmflow verify {dataset.uri}`")
    return found


def pack(index: pa.Table, *, frames: bool) -> Records:
    """The rows of an index that has the columns of `COLUMNS`, without nulls."""
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
        there = size != 0  # a text that an adopted tar lacks lies where the image does: that would be read twice
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
    found = end > 0
    records["rest_offset"] = np.where(found, start, records["image_offset"])
    records["rest_bytes"] = np.where(found, end - start, 0)
    return Records(
        packed=records.tobytes(),
        keys="".join(key.to_pylist()).encode(),
        extensions=tuple(extension.dictionary.to_pylist()),
        frames=packed.tobytes(),
        caption_tokens=index["caption_tokens"].to_numpy(),
    )
