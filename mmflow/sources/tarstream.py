"""The members of anyone's tar in one pass, and to its end: damage is an event that names the byte, and is passed by.

`tarfile` ends in silence at the first header that it cannot read, and so does everything that reads tars through it.
Here reading goes on at the next header that is whole. Our own shards are read by `mmflow.dataset.tar`, which admits
nothing but plain ustar.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

BLOCK_BYTES = tarfile.BLOCKSIZE
SKIP_BYTES = 1 << 20
MAX_MEMBER_BYTES = 256 << 20  # what a worker can hold beside the image that it decodes
MAX_EXTENSION_BYTES = 1 << 20  # of a PAX header or a GNU long name
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
MARKS = (b"ustar\x0000", b"ustar  \x00")  # POSIX's and GNU's, at byte 257


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the tar; `body` is None where it is not wanted or larger than `MAX_MEMBER_BYTES`.

    `offset` is where the body begins, in bytes from the start of the tar.
    """

    name: str
    size: int
    body: bytes | None
    offset: int


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong, at a byte from the start of the tar; `name` is the member's that it is within, if any."""

    offset: int
    what: str
    name: str | None = None


class _CutShort(Exception):  # noqa: N818 - caught where the member is known
    """The stream ended within a body."""


def read_members(stream: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[Member | Damage]:
    """The regular files in order, with the damage between them. Bodies are read of names that are `wanted`.

    A tar that ends without an end of archive was cut, at a place where nothing else shows it.
    """
    reader = _Reader(stream)
    names: dict[str, str] = {}  # what extension headers say of the next member: path, size
    ended = False
    while block := reader.read_block():
        start = reader.offset - len(block)
        if not block.strip(b"\0") and len(block) == BLOCK_BYTES:
            ended = True
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:
                raise tarfile.HeaderError("negative size")
        except tarfile.HeaderError as error:
            names, ended = {}, False
            if reader.find_header():
                yield Damage(start, f"damaged header ({error}); read on from byte {reader.offset}")
                continue
            yield Damage(start, f"damaged header ({error}); nothing behind it can be read")
            return
        ended = False
        name = names.get("path", header.name)
        offset = reader.offset
        try:
            if header.type in EXTENSIONS:
                names |= _extensions(header.type, reader.body(header.size, keep=header.size <= MAX_EXTENSION_BYTES))
                continue
            size = int(names["size"]) if names.get("size", "").isdecimal() else header.size
            keep = header.type in REGULAR and size <= MAX_MEMBER_BYTES and wanted(name)
            body = reader.body(size, keep)
        except _CutShort:
            yield Damage(reader.offset, f"ends within {name}, which has {header.size} bytes", name)
            return
        if header.type != tarfile.XGLTYPE:
            names = {}
        if header.type in REGULAR and not name.endswith("/"):
            yield Member(name, size, body, offset)
    if not ended:
        yield Damage(reader.offset, "ends without an end of archive")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member as webdataset has it: the path up to the first dot of its base name, and the rest.

    None for a name that belongs to no sample: without a dot, or with nothing before it, as hidden files have. (Of these
    webdataset takes those in folders for samples of the folder's name; nobody means them.)
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else None


class _Reader:
    """A stream that counts its bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._next = b""  # a block that was looked at
        self.offset = 0

    def read_block(self) -> bytes:
        """The next 512 bytes; fewer at the end."""
        block = self._next or self._stream.read(BLOCK_BYTES)
        self._next = b""
        self.offset += len(block)
        return block

    def body(self, size: int, keep: bool) -> bytes | None:
        """A body, going on behind its padding; None where it is not kept. Raises _CutShort."""
        body = None
        if keep:
            body = self._stream.read(size)
            self.offset += len(body)
        if (body is not None and len(body) < size) or (body is None and self._skip(size) < size):
            raise _CutShort
        self._skip(-size % BLOCK_BYTES)  # where this is cut off, the body is whole, and the end is met next
        return body

    def find_header(self) -> bool:
        """Go to the next block that is a header beyond doubt: one with a mark, and a checksum that is right."""
        while len(block := self.read_block()) == BLOCK_BYTES:
            if block[257:265] in MARKS:
                try:
                    tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                except tarfile.HeaderError:
                    continue
                self._next = block
                self.offset -= BLOCK_BYTES
                return True
        return False

    def _skip(self, size: int) -> int:
        """Read past so many bytes, or to the end; how many there were."""
        left = size
        while left and (skipped := len(self._stream.read(min(left, SKIP_BYTES)))):
            self.offset += skipped
            left -= skipped
        return size - left


def _extensions(kind: bytes, body: bytes | None) -> dict[str, str]:
    """Path and size from a GNU long name or a PAX header: records of "length name=value" and a newline."""
    if body is None:
        return {}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while body:
        length, _, _ = body.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(body):
            break
        name, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        if name in (b"path", b"size"):
            found[name.decode()] = value.decode("utf-8", "surrogateescape")
        body = body[int(length) :]
    return found
