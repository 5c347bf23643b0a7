"""Plain ustar, written and scanned at the speed of the bytes: what every reader of shards opens, and nothing more.

`tarfile` costs more than the pictures do (2,400 samples/s written through webdataset), stamps times and users into the
archive, and ends in silence at the first header it cannot read. Here the same members give the same bytes, and a
damaged header is an error that says where.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from mmap import mmap
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from mmflow.core.errors import CorruptArtifactError, MisuseError

BLOCK_BYTES = 512
MAX_NAME_BYTES = 100
MAX_BODY_BYTES = 8**11 - 1  # eleven octal digits
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
REGULAR_FILE = (b"0", b"\0")

# The header's fields around name, size and checksum, as POSIX.1-1988 lays them out.
MODE_AND_OWNERS = b"0000644\x000000000\x000000000\x00"
MTIME = b"00000000000\x00"
BLANK_CHECKSUM = b"        "
KIND_AND_MAGIC = b"0" + bytes(100) + b"ustar\x0000"
TAIL = KIND_AND_MAGIC + bytes(BLOCK_BYTES - 156 - len(KIND_AND_MAGIC))
BLANK_SUM = sum(BLANK_CHECKSUM)
TAIL_SUM = sum(TAIL)
CONSTANT_SUM = sum(MODE_AND_OWNERS) + sum(MTIME) + BLANK_SUM + TAIL_SUM
HEADER_OF_NOTHING = bytes(100) + MODE_AND_OWNERS + bytes(12) + MTIME + bytes(7) + b" " + TAIL


class Member(NamedTuple):
    """A file within a tar: `offset` is where its body begins, in bytes from the start of the tar."""

    name: str
    offset: int
    size: int


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a body of `size` bytes. Raises MisuseError for what ustar cannot hold."""
    encoded = name.encode()
    if not 0 < len(encoded) <= MAX_NAME_BYTES or b"\0" in encoded:
        raise MisuseError(f"member name {name!r}: 1 to {MAX_NAME_BYTES} bytes without NUL are needed; shorten the key")
    if not 0 <= size <= MAX_BODY_BYTES:
        raise MisuseError(f"member {name}: {size} bytes, but a ustar member has at most {MAX_BODY_BYTES}; split it")
    octal = b"%011o\0" % size
    checksum = CONSTANT_SUM + sum(encoded) + sum(octal)
    return b"%b%b%b%b%06o\0 %b" % (encoded.ljust(100, b"\0"), MODE_AND_OWNERS, octal, MTIME, checksum, TAIL)


def headers(names: pa.Array, sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """`header` of many members at once, (members, 512). Raises MisuseError where a name or a size is too long."""
    encoded = names.cast(pa.binary())
    lengths = np.diff(ends := np.frombuffer(encoded.buffers()[1], np.int32)[encoded.offset :][: len(encoded) + 1])
    if len(lengths) and (not 0 < lengths.min() <= lengths.max() <= MAX_NAME_BYTES):
        raise MisuseError(f"a member name of {lengths.max()} bytes: 1 to {MAX_NAME_BYTES} are needed")
    if len(sizes) and not 0 <= sizes.min() <= sizes.max() <= MAX_BODY_BYTES:
        raise MisuseError(f"a member of {sizes.max()} bytes, but a ustar member has 0 to {MAX_BODY_BYTES}")
    made = np.tile(np.frombuffer(HEADER_OF_NOTHING, np.uint8), (len(lengths), 1))
    # (members, 100): true where the member's name has a letter; in row order these are the letters of all names.
    is_letter = np.arange(MAX_NAME_BYTES) < lengths[:, None]
    made[:, :MAX_NAME_BYTES][is_letter] = np.frombuffer(encoded.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    made[:, 124:135] = octal_digits(sizes, 11)
    totals = CONSTANT_SUM + made[:, :MAX_NAME_BYTES].sum(1, dtype=np.int64) + made[:, 124:135].sum(1, dtype=np.int64)
    made[:, 148:154] = octal_digits(totals, 6)
    return made


def octal_digits(values: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """The ASCII octal digits of each value, (values, width)."""
    return (values[:, None] >> np.arange(3 * width - 3, -1, -3) & 7).astype(np.uint8) + ord("0")


def padding(size: int) -> int:
    """How many zero bytes follow a body of `size` bytes."""
    return -size % BLOCK_BYTES


class TarWriter:
    """Appends members to a stream, and knows the archive's length and checksum without reading it again."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = xxhash.xxh3_128()
        self.bytes = 0

    def add(self, members: Iterable[tuple[str, bytes]]) -> list[int]:
        """Append files, each a name and a body; return the offsets of their bodies."""
        offsets: list[int] = []
        parts: list[bytes] = []
        end = self.bytes
        for name, body in members:
            size = len(body)
            parts += (header(name, size), body, bytes(padding(size)))
            offsets.append(end + BLOCK_BYTES)
            end += BLOCK_BYTES + size + padding(size)
        self._write(b"".join(parts))
        return offsets

    def finish(self) -> str:
        """Write the end of the archive; return the xxh3_128 (hex) of everything written."""
        self._write(END_OF_ARCHIVE)
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def scan(tar: bytes | mmap) -> Iterator[Member]:
    """The members of a tar, from its headers alone.

    Raises CorruptArtifactError, with the offset, at a damaged header, a body cut short, a missing end of the archive
    or a member that is not a regular file.
    """
    offset = 0
    while True:
        block = tar[offset : offset + BLOCK_BYTES]
        if len(block) < BLOCK_BYTES:
            raise CorruptArtifactError(f"ends at byte {len(tar)} without an end of archive")
        if not block.rstrip(b"\0"):
            return
        # The checksum counts its own eight bytes as spaces. Two thirds of our own headers are one constant.
        rest = block[156:]
        total = sum(block[:148]) + BLANK_SUM + (TAIL_SUM if rest == TAIL else sum(rest))
        if total != _octal(block[148:156], offset):
            raise CorruptArtifactError(f"damaged header at byte {offset}")
        if block[156:157] not in REGULAR_FILE:
            raise CorruptArtifactError(f"member of type {block[156:157]!r} at byte {offset}; only files are read")
        size = _octal(block[124:136], offset)
        name = _text(block[:100], offset)
        prefix = _text(block[345:500], offset)
        body = offset + BLOCK_BYTES
        offset = body + size + padding(size)
        if offset > len(tar):
            raise CorruptArtifactError(f"ends at byte {len(tar)} within {name}, which has {size} bytes from {body}")
        yield Member(f"{prefix}/{name}" if prefix else name, body, size)


def _octal(field: bytes, offset: int) -> int:
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise CorruptArtifactError(f"damaged header at byte {offset}: {field!r} is not a number") from error


def _text(field: bytes, offset: int) -> str:
    try:
        return field.partition(b"\0")[0].decode()
    except UnicodeDecodeError as error:
        raise CorruptArtifactError(f"damaged header at byte {offset}: a name that is not UTF-8") from error
