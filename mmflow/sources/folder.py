"""Folders of images: captions in files of the same stem, or in a list for the folder and everything below it."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import xxhash

from mmflow.core.errors import MisuseError
from mmflow.core.listing import File, extension, fingerprint, is_image, open_stream, walk
from mmflow.core.storage import join, local_path
from mmflow.sources.config import SourceConfig
from mmflow.sources.fields import SIDECARS, read_sidecars
from mmflow.sources.jsonl_csv import read_csv, read_jsonl
from mmflow.sources.reasons import Reason, Rejected, malformed
from mmflow.sources.records import UNREADABLE, Fields, Kind, Record, Unit, attempt, unreadable

FILES_PER_UNIT = 2000
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
NUMBER = re.compile(r"(\d+)")


def list_folder(unit: Unit, source: SourceConfig) -> Iterator[Unit]:
    """The units of the folder at `unit.uri`. Raises MisuseError for two captions files in one folder.

    A captions file is a unit with the images below it. Other images are grouped by the first folder of their path, so
    that a folder added to a source leaves the units of the other folders as they were.
    """
    files = walk(unit.uri)
    lists: dict[str, str] = {}  # folder → its captions file
    for file in files:
        folder, _, name = file.name.rpartition("/")
        if name.lower() in CAPTION_FILES:
            if folder in lists:
                raise MisuseError(f"{unit.uri}: {lists[folder]} and {file.name} both list captions; keep one of them")
            lists[folder] = file.name
    listed: dict[str, list[File]] = {folder: [] for folder in lists}
    groups: defaultdict[str, list[File]] = defaultdict(list)
    for file in files:
        if not (is_image(file.name) or extension(file.name) in SIDECARS or file.name in lists.values()):
            continue
        folder = posixpath.dirname(file.name)
        while folder and folder not in lists:
            folder = posixpath.dirname(folder)
        if folder in lists:
            listed[folder].append(file)
        else:
            record = posixpath.dirname(file.name) if source.frames and is_image(file.name) else file.name
            groups[record.partition("/")[0] if "/" in record else ""].append(file)
    for folder, members in listed.items():
        members.sort(key=lambda file: file.name != lists[folder])  # the captions file first
        below = [replace(file, name=file.name.removeprefix(f"{folder}/" if folder else "")) for file in members]
        uri = join(unit.uri, folder) if folder else unit.uri
        prefix = unit.label(folder) if folder else unit.prefix
        yield _unit(replace(unit, uri=uri, prefix=prefix), below[0].name, below)
    for group, members in groups.items():
        for number, part in enumerate(_parts(members, source.frames)):
            yield _unit(unit, f"{group}#{number}", part)


def _parts(files: Sequence[File], frames: bool) -> Iterator[list[File]]:
    """Runs of at most `FILES_PER_UNIT` files; the files of one record stay together."""
    records: defaultdict[str, list[File]] = defaultdict(list)
    for file in files:
        records[_record_name(file.name, frames)].append(file)
    part: list[File] = []
    for name in sorted(records, key=lambda name: name.split("/")):
        if part and len(part) + len(records[name]) > FILES_PER_UNIT:
            yield part
            part = []
        part += records[name]
    if part:
        yield part


def _record_name(name: str, frames: bool) -> str:
    if frames and is_image(name):
        return posixpath.dirname(name)
    stem = name.rpartition(".")[0]
    while is_image(stem):  # cat.jpg.txt
        stem = stem.rpartition(".")[0]
    return stem


def _unit(unit: Unit, name: str, files: Sequence[File]) -> Unit:
    """A unit with its fingerprint: names and sizes of images, and the content of all other files.

    The bytes of images are read once only, when a record is prepared. In an object store, the time of writing stands
    for the content.
    """
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.modified}\0".encode("utf-8", "surrogateescape"))
    if local_path(unit.uri) is not None:
        digest.update(fingerprint(unit.uri, [file.name for file in files if not is_image(file.name)]).encode())
    records = sum(is_image(file.name) for file in files)
    names = tuple(file.name for file in files)
    return replace(unit, name=unit.label(name), files=names, fingerprint=digest.hexdigest(), records=records)


# --- records ----------------------------------------------------------------------------------------------------------


def read_folder(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The records of a unit: those of its captions file, then each image, or folder of frames, that is not listed.

    A sidecar without an image is a record with a missing image. Of two sidecars that differ in the case of their
    extension, one is read, and the other is a malformed record unless both say the same.
    """
    images: defaultdict[str, list[str]] = defaultdict(list)  # record → its images
    sidecars: defaultdict[str, dict[str, str]] = defaultdict(dict)  # stem → extension → file
    ignored: list[str] = []  # a.TXT beside a.txt: the last in order is read, which is the lower-case one
    captions = unit.files[0] if posixpath.basename(unit.files[0]).lower() in CAPTION_FILES else None
    for name in unit.files[1:] if captions else unit.files:
        if is_image(name):
            images[posixpath.dirname(name) if source.frames else name].append(name)
            continue
        stem, kind = name.rpartition(".")[0], extension(name)
        if kind in sidecars[stem]:
            ignored.append(sidecars[stem][kind])
        sidecars[stem][kind] = name
    listed: set[str] = set()
    if captions is not None:
        yield from _read_captions(unit, captions, source, images, listed)
    used: set[str] = set()
    for name, members in images.items():
        beside = _beside(name, sidecars, source.frames)
        used.update(beside.values())
        if name not in listed:
            content = attempt(read_sidecars, unit, beside, source.fields, images=_in_order(members))
            yield Record(unit.label(name) if name else unit.prefix, content)
    for name in (name for kinds in sidecars.values() for name in kinds.values() if name not in used):
        yield Record(unit.label(name), Rejected(Reason.image_missing, "there is no image of this name beside it"))
    for name in ignored:
        read = sidecars[name.rpartition(".")[0]][extension(name)]
        if not _is_same(unit, name, read):
            yield Record(unit.label(name), malformed(f"{read} is read instead, and says something else"))


def _read_captions(
    unit: Unit, captions: str, source: SourceConfig, images: Mapping[str, Sequence[str]], listed: set[str]
) -> Iterator[Record]:
    """The records of a captions file; adds the names of their images to `listed`.

    An unreadable captions file is one row, so that the images below it are still read.
    """
    try:
        for record in (read_csv if extension(captions) == "csv" else read_jsonl)(unit, source):
            if isinstance(record.content, Fields):
                names = [posixpath.normpath(image) for image in record.content.images]
                listed.update(names)
                if len(names) == 1 and names[0] in images:
                    frames = _in_order(images[names[0]])
                    record = replace(record, content=replace(record.content, images=frames))
            yield record
    except UNREADABLE as error:
        yield Record(unit.label(captions), unreadable(error))


def _is_same(unit: Unit, name: str, other: str) -> bool:
    try:
        with open_stream(unit.uri, name) as stream, open_stream(unit.uri, other) as other_stream:
            return stream.read() == other_stream.read()
    except UNREADABLE:
        return False


def _beside(name: str, sidecars: Mapping[str, Mapping[str, str]], frames: bool) -> dict[str, str]:
    """Extension → sidecar of an image, cat.txt or cat.jpg.txt, or of a folder of frames: beside or alone inside it."""
    if not frames:
        return {**sidecars.get(name.rpartition(".")[0], {}), **sidecars.get(name, {})}
    inside = [kinds for stem, kinds in sidecars.items() if posixpath.dirname(stem) == name and stem != name]
    beside: dict[str, str] = {}
    for kind in SIDECARS:
        names = [kinds[kind] for kinds in inside if kind in kinds]
        if len(names) == 1:
            beside[kind] = names[0]
    return {**beside, **(sidecars.get(name, {}) if name else {})}


def _in_order(names: Iterable[str]) -> list[str]:
    """By name, with numbers in names as numbers: frame 10 comes after frame 9."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in NUMBER.split(name)])


KIND = Kind(read=read_folder, recognises=lambda files: any(map(is_image, files)), units_of_folder=list_folder)
