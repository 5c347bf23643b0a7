"""A tar held against its index in one pass: every byte hashed, every header compared, in blocks of a few MiB.

The index says where each header is and what it must be, so that nothing is parsed: whole blocks of headers are made and
compared as arrays. Parsing them one by one cost ten times as much, and is left for a tar in which something is wrong.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from mmflow.core.errors import MissingArtifactError, MisuseError
from mmflow.core.storage import COPY_BYTES, filesystem, local_path
from mmflow.dataset.index import MEMBERS
from mmflow.dataset.tar import BLOCK_BYTES, END_OF_ARCHIVE, headers, scan
from mmflow.sources.webdataset import Damage, read_members

READ_BYTES = 2 << 20  # fits the second-level cache between being read, hashed and compared


@dataclass(frozen=True)
class Layout:
    """The members that an index promises, in the order of the tar; `names` are not known of tars that others wrote."""

    names: pa.Array
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    rows: NDArray[np.int64]
    ours: bool

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where the next member's header begins, or the end of the archive."""
        return self.offsets + self.sizes + -self.sizes % BLOCK_BYTES

    @property
    def is_gapless(self) -> bool:
        """Whether every byte of the tar belongs to a member of the index."""
        return bool(np.array_equal(self.offsets, np.concatenate([[0], self.ends[:-1]]) + BLOCK_BYTES))


def layout_of(index: pa.Table, *, ours: bool) -> Layout:
    """The members of an index without nulls: of each row image, txt, JSON, then frames."""
    index = index.combine_chunks()
    num_rows = index.num_rows
    key = index["key"].combine_chunks()
    frames = index["frames"].combine_chunks()
    frame_rows = np.asarray(pc.list_parent_indices(frames), np.int64)
    frame_fields = frames.flatten()
    first = np.searchsorted(frame_rows, frame_rows)
    numbers = pa.array([f"{number:03d}" for number in (np.arange(len(frame_rows)) - first + 1).tolist()], pa.string())
    extension = index["image_extension"].combine_chunks()
    names = [pc.binary_join_element_wise(key, suffix, ".") for suffix in (extension, "txt", "json")]
    names.append(pc.binary_join_element_wise(key.take(frame_rows), numbers, extension.take(frame_rows), "."))
    offsets = [index[f"{member}_offset"].to_numpy() for member in MEMBERS]
    sizes = [index[f"{member}_bytes"].to_numpy() for member in MEMBERS]
    offsets.append(frame_fields.field("offset").to_numpy(zero_copy_only=False))
    sizes.append(frame_fields.field("bytes").to_numpy(zero_copy_only=False))
    rows = np.concatenate([np.tile(np.arange(num_rows), len(MEMBERS)), frame_rows])
    if ours:
        order = np.argsort(rows, kind="stable")
    else:  # a missing text has no member, and the others stand in any order
        order = np.argsort(np.concatenate(offsets), kind="stable")
        order = order[np.concatenate(sizes)[order] > 0]
    return Layout(
        pa.concat_arrays(names).take(order),
        np.concatenate(offsets)[order],
        np.concatenate(sizes)[order],
        rows[order],
        ours,
    )


@dataclass(frozen=True)
class Passed:
    """What one pass over a tar found; a tar that is not `sound` is worth `check_members`."""

    bytes: int
    checksum: str  # xxh3_128, hex
    sound: bool


def pass_over(uri: str, layout: Layout) -> Passed:
    """Read a tar once, whole. Sound is one whose headers are, byte for byte, what its index asks for.

    Of tars that others wrote: whose headers have a right checksum and the size in the index.
    """
    starts = layout.offsets - BLOCK_BYTES
    end = int(layout.ends[-1]) if len(starts) else 0
    sound = layout.is_gapless if layout.ours else not (starts % BLOCK_BYTES).any()
    digest, total, compared = xxhash.xxh3_128(), 0, 0
    for block in read_blocks(uri):
        digest.update(block)
        data = np.frombuffer(block, np.uint8)
        if sound:
            # Tars are made of 512 bytes, as are the blocks: no header lies across two of them.
            places = data[: len(data) // BLOCK_BYTES * BLOCK_BYTES].reshape(-1, BLOCK_BYTES)
            low, high = np.searchsorted(starts, [total, total + places.size]).tolist()
            sound = _are_sound(places[(starts[low:high] - total) // BLOCK_BYTES], layout, low, high)
            compared += high - low
        if layout.ours and sound and end < total + len(data):
            sound = not data[max(0, end - total) :].any()
        total += len(data)
    sound = sound and compared == len(starts) and total >= end
    if layout.ours:
        sound = sound and total == end + len(END_OF_ARCHIVE)
    return Passed(total, digest.hexdigest(), sound)


def check_members(uri: str, layout: Layout) -> Iterator[str]:
    """Where a tar's headers differ from the index, a line each, parsing one after another.

    Raises CorruptArtifactError where the tar cannot be read on.
    """
    names, offsets, sizes = layout.names.to_pylist(), layout.offsets.tolist(), layout.sizes.tolist()
    if not layout.ours:
        system, path = filesystem(uri)
        found: dict[int, int] = {}
        with system.open_input_stream(path, buffer_size=READ_BYTES) as stream:
            for each in read_members(stream, lambda name: False):
                if isinstance(each, Damage):
                    yield f"{uri}: byte {each.offset}: {each.what}"
                else:
                    found[each.offset] = each.size
        for row, offset, size in zip(layout.rows.tolist(), offsets, sizes, strict=True):
            if found.get(offset) != size:
                yield f"{uri}: row {row}: no member of {size} bytes at byte {offset}"
        return
    with _mapped(uri) as tar:
        members = scan(tar)
        for row, *expected in zip(layout.rows.tolist(), names, offsets, sizes, strict=True):
            member = next(members, None)
            if member is None:
                yield f"{uri}: ends before {expected[0]} (row {row})"
                return
            if member != (promised := tuple(expected)):
                yield f"{uri}: row {row}: {tuple(member)} in the tar, {promised} in the index (name, offset, bytes)"
        if (extra := next(members, None)) is not None:
            yield f"{uri}: {extra.name} at byte {extra.offset} is not in the index"


def read_blocks(uri: str, size: int = READ_BYTES) -> Iterator[memoryview]:
    """The file's bytes in blocks of `size`, the last one shorter. A block is good until the next is asked for."""
    buffer = memoryview(bytearray(size))
    path = local_path(uri)
    system, remote = filesystem(uri)
    try:
        with open(path, "rb", buffering=0) if path is not None else system.open_input_stream(remote) as stream:
            while True:
                filled = 0
                while filled < size and (got := stream.readinto(buffer[filled:])):
                    filled += got
                if filled:
                    yield buffer[:filled]
                if filled < size:
                    return
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error


def _are_sound(found: NDArray[np.uint8], layout: Layout, low: int, high: int) -> bool:
    if layout.ours:
        try:
            return bool(np.array_equal(found, headers(layout.names.slice(low, high - low), layout.sizes[low:high])))
        except MisuseError:
            return False
    sums = found.sum(1, dtype=np.int64) - found[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    return bool(
        (_octal(found[:, 148:154]) == sums).all() and (_octal(found[:, 124:135]) == layout.sizes[low:high]).all()
    )


def _octal(digits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The number that each row of ASCII octal digits says, -1 for what is none."""
    values = digits.astype(np.int64) - ord("0")
    weights = 8 ** np.arange(digits.shape[1] - 1, -1, -1)
    return np.where(((values >= 0) & (values < 8)).all(1), values @ weights, -1)


@contextmanager
def _mapped(uri: str) -> Iterator[bytes | mmap.mmap]:
    """A tar's bytes; a remote one is copied to a temporary file, as it may be larger than the memory."""
    path = local_path(uri)
    with tempfile.TemporaryFile() if path is None else path.open("rb") as file:
        if path is None:
            system, remote = filesystem(uri)
            with system.open_input_stream(remote) as stream:
                shutil.copyfileobj(stream, file, COPY_BYTES)
            file.flush()
        if file.seek(0, 2) == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield mapped
