"""WebDataset tars from anywhere: the members of any tar in one pass, and samples made of members with one key.

`tarfile`, and everything that reads tars through it, stops silently at the first header that it cannot read. Here
damage is an event that names the byte, and reading goes on at the next whole header. mmflow's own shards are read by
`mmflow.dataset.tar`, which accepts plain ustar only.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO

from mmflow.core.listing import IMAGE_EXTENSIONS, open_stream
from mmflow.sources.config import FieldsConfig, SourceConfig
from mmflow.sources.fields import SIDECARS, fields_of_sidecars
from mmflow.sources.reasons import Reason, Rejected, damaged
from mmflow.sources.records import Fields, Kind, Record, Unit, attempt

BLOCK_BYTES = tarfile.BLOCKSIZE
SKIP_BYTES = 1 << 20
MAX_MEMBER_BYTES = 256 << 20  # what a worker can hold beside the image that it decodes
MAX_EXTENSION_BYTES = 1 << 20  # of a PAX header or a GNU long name
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
MARKS = (b"ustar\x0000", b"ustar  \x00")  # POSIX and GNU, at byte 257
UNDECIDED_SAMPLES = 4  # damaged samples kept at the start of a tar until a whole one shows what they lack
FRAME = re.compile(r"(?:.*\.)?(\d+)\.\w+")  # 001.jpg, frame.001.jpg


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the tar. `body` is None if it was not wanted or is larger than `MAX_MEMBER_BYTES`.

    `offset` is where the body begins, in bytes from the start of the tar.
    """

    name: str
    size: int
    body: bytes | None
    offset: int


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong at a byte from the start of the tar; `name` is the damaged member, if any."""

    offset: int
    what: str
    name: str | None = None


class _CutShort(Exception):  # noqa: N818 - the stream ended within a body; caught where the member is known
    pass


def read_members(stream: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[Member | Damage]:
    """The regular files in order, with the damage between them. Bodies are read where `wanted(name)`.

    A tar without an end of archive counts as damaged: it was cut, and nothing else shows where.
    """
    reader = _Reader(stream)
    names: dict[str, str] = {}  # path and size of the next member, from extension headers
    ended = False
    while block := reader.read_block():
        start = reader.offset - len(block)
        if not block.strip(b"\0") and len(block) == BLOCK_BYTES:
            ended = True
            continue
        ended = False
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:
                raise tarfile.HeaderError("negative size")
        except tarfile.HeaderError as error:
            names = {}
            if reader.find_header():
                yield Damage(start, f"damaged header ({error}); read on from byte {reader.offset}")
                continue
            yield Damage(start, f"damaged header ({error}); nothing after it can be read")
            return
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
    """(key, extension) of a member, as webdataset splits its name at the first dot of the base name.

    None for names without a dot, or with nothing before it, such as hidden files. (webdataset takes hidden files in
    folders for samples named after the folder, which nobody means.)
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else None


class _Reader:
    """A stream that counts its bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._next = b""  # a block read ahead
        self.offset = 0

    def read_block(self) -> bytes:
        """The next 512 bytes; fewer at the end."""
        block = self._next or self._stream.read(BLOCK_BYTES)
        self._next = b""
        self.offset += len(block)
        return block

    def body(self, size: int, keep: bool) -> bytes | None:
        """A body, with its padding skipped; None if it is not kept. Raises _CutShort."""
        body = None
        if keep:
            body = self._stream.read(size)
            self.offset += len(body)
        if (self._skip(size) if body is None else len(body)) < size:
            raise _CutShort
        self._skip(-size % BLOCK_BYTES)  # if the padding is cut, the body is still whole
        return body

    def find_header(self) -> bool:
        """Go to the next block that is certainly a header: it has a mark and a correct checksum."""
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
        """Skip up to `size` bytes; the number skipped, fewer at the end."""
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
    values: dict[str, str] = {}
    while body:
        length, _, _ = body.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(body):
            break
        name, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        if name in (b"path", b"size"):
            values[name.decode()] = value.decode("utf-8", "surrogateescape")
        body = body[int(length) :]
    return values


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Members with one key that follow each other: extension → size, and the bodies that were read."""

    key: str
    damaged: bool  # next to damage: it may have had more members
    sizes: dict[str, int] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)


def read_webdataset(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The records of a tar. Each damage is one row with source_damaged."""
    label = unit.label(unit.files[0])
    with open_stream(unit.uri, unit.files[0]) as stream:
        for key, content in read_samples(stream, source.fields):
            yield Record(f"{label}:{key}" if key else label, content)


def read_samples(stream: IO[bytes], names: FieldsConfig) -> Iterator[tuple[str | None, Fields | Rejected]]:
    """(key, content) of each sample of a tar, in order; the key is None for damage.

    A sample next to damage is kept if it has all extensions of the last whole sample. Otherwise it is lost, and the
    detail of the damage names it.
    """
    whole: frozenset[str] | None = None  # extensions of the last sample away from damage
    damages: list[Damage] = []
    lost: list[str] = []
    undecided: list[Sample] = []  # at the start, before the first whole sample

    def complete(samples: list[Sample], extensions: frozenset[str]) -> Iterator[tuple[str, Fields | Rejected]]:
        for sample in samples:
            if extensions <= sample.sizes.keys():
                yield sample.key, attempt(_fields_of_sample, sample, names)
            else:
                lost.append(sample.key)

    for sample in _samples(stream):
        if isinstance(sample, Damage):
            damages.append(sample)
        elif not sample.damaged:
            whole = frozenset(sample.sizes)
            yield from complete(undecided, whole)
            yield from _rejections(damages, lost)
            damages, lost, undecided = [], [], []
            yield sample.key, attempt(_fields_of_sample, sample, names)
        elif whole is not None:
            yield from complete([sample], whole)
        elif len(undecided) < UNDECIDED_SAMPLES:
            undecided.append(sample)
        else:
            lost.append(sample.key)
    yield from _rejections(damages, [*(sample.key for sample in undecided), *lost])


def _samples(stream: IO[bytes]) -> Iterator[Sample | Damage]:
    """The samples; damage comes before the sample in which it was met."""
    sample: Sample | None = None
    after_damage = False
    for member in read_members(stream, _is_wanted):
        split = split_name(member.name) if member.name is not None else None
        if isinstance(member, Damage):
            yield member
            if sample is not None and (split is None or split[0] == sample.key):
                sample.damaged = True
            after_damage = True
            continue
        if split is None:
            continue
        key, extension = split
        if sample is None or key != sample.key or extension in sample.sizes:
            if sample is not None:
                yield sample
            sample, after_damage = Sample(key, after_damage), False
        sample.sizes[extension] = member.size
        if member.body is not None:
            sample.bodies[extension] = member.body
    if sample is not None:
        yield sample


def _fields_of_sample(sample: Sample, names: FieldsConfig) -> Fields:
    images = _images(sample)
    for extension in (*images, *SIDECARS):
        if sample.sizes.get(extension, 0) > MAX_MEMBER_BYTES:
            reason = Reason.image_too_large if extension in images else Reason.record_malformed
            raise Rejected(reason, f".{extension} has {sample.sizes[extension]} bytes, at most {MAX_MEMBER_BYTES}")
    no_image = f"no image among its members: {', '.join(sample.sizes)}"
    fields = fields_of_sidecars(sample.bodies, names)
    return replace(fields, key=sample.key, bodies=[sample.bodies[name] for name in images], no_image=no_image)


def _images(sample: Sample) -> list[str]:
    """The extensions of its images: one image, or the frames of a clip in the order of their numbers."""
    first = [extension for extension in IMAGE_EXTENSIONS if extension in sample.sizes][:1]
    nested = [extension for extension in sample.sizes if "." in extension and _is_image(extension)]
    frames = sorted((int(match[1]), extension) for extension in nested if (match := FRAME.fullmatch(extension)))
    return first + [extension for _, extension in frames] or nested[:1]


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _is_wanted(name: str) -> bool:
    split = split_name(name)
    return split is not None and (split[1] in SIDECARS or _is_image(split[1]))


def _rejections(damages: list[Damage], lost: list[str]) -> Iterator[tuple[None, Rejected]]:
    """One per damage; the first names the samples that were lost with it."""
    samples = f"; not whole: {', '.join(lost)}" if lost else ""
    for damage in damages:
        yield None, damaged(f"byte {damage.offset}: {damage.what}{samples}")
        samples = ""


KIND = Kind(
    read=read_webdataset,
    extensions=("tar",),
    recognises=lambda files: any(name.lower().endswith(".tar") for name in files),
)
