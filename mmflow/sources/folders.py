"""Folders of images: captions in files of the same stem, or in a list for the folder and what lies below it."""

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
from mmflow.sources.fields import Fields
from mmflow.sources.lists import read_csv, read_jsonl
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import UNREADABLE, Found, malformed, unreadable
from mmflow.sources.sidecars import SIDECARS, read_sidecars
from mmflow.sources.units import Unit

FILES_PER_UNIT = 2000
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
NUMBER = re.compile(r"(\d+)")


def list_folder(unit: Unit, frames: bool) -> Iterator[Unit]:
    """The units of the folder at `unit.uri`. Raises MisuseError for two captions files in one folder.

    A captions file is a unit with the images below it. Other images are dealt by the first folder in their path: a
    folder that is added to a source leaves the units of the others as they were.
    """
    files = walk(unit.uri)
    lists: dict[str, str] = {}
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
        above = next((folder for folder in _folders_above(file.name) if folder in lists), None)
        if above is not None:
            listed[above].append(file)
        else:
            groups[_group(file.name, frames)].append(file)
    for folder, found in listed.items():
        found.sort(key=lambda file: file.name != lists[folder])  # the list first
        below = [
            File(file.name[len(folder) + 1 :] if folder else file.name, file.size, file.modified) for file in found
        ]
        uri = join(unit.uri, folder) if folder else unit.uri
        yield _unit(replace(unit, uri=uri, prefix=unit.label(folder) if folder else unit.prefix), below[0].name, below)
    for group, found in groups.items():
        for number, part in enumerate(_parts(found, frames)):
            yield _unit(unit, f"{group}#{number}", part)


def read_folder(unit: Unit, source: SourceConfig) -> Iterator[Found]:
    """The records of a unit: those that its captions file lists, then each image, or folder of them, of no list.

    A sidecar without an image is a record whose image is missing. Of two that differ in the case of their extension one
    is read, and the other is a row that says so, unless both say the same.
    """
    images: defaultdict[str, list[str]] = defaultdict(list)  # record → its images
    sidecars: defaultdict[str, dict[str, str]] = defaultdict(dict)  # stem → extension → file
    passed_over: list[str] = []  # a.TXT beside a.txt: the last in order counts, which is that in lower case
    captions = unit.files[0] if posixpath.basename(unit.files[0]).lower() in CAPTION_FILES else None
    for name in unit.files[1:] if captions else unit.files:
        if is_image(name):
            images[posixpath.dirname(name) if source.frames else name].append(name)
        else:
            stem, kind = name.rpartition(".")[0], extension(name)
            if kind in sidecars[stem]:
                passed_over.append(sidecars[stem][kind])
            sidecars[stem][kind] = name
    row = 0
    seen: set[str] = set()
    if captions is not None:
        for found in _listed(unit, captions, source):
            row = found.row
            if isinstance(found.what, Fields) and len(found.what.images) == 1:
                name = posixpath.normpath(found.what.images[0])
                if name in images:
                    seen.add(name)
                    yield replace(found, what=replace(found.what, images=_in_order(images[name])))
                    continue
            elif isinstance(found.what, Fields):
                seen.update(map(posixpath.normpath, found.what.images))
            yield found
    used: set[str] = set()
    for name, members in images.items():
        beside = _beside(name, sidecars, source.frames)
        used.update(beside.values())
        if name in seen:
            continue
        row += 1
        what: Fields | Rejected
        try:
            what = replace(read_sidecars(unit, beside, source.fields), images=_in_order(members))
        except Rejected as rejected:
            what = rejected
        yield Found(row, unit.label(name) if name else unit.prefix, what)
    for stem in sidecars:
        for name in sidecars[stem].values():
            if name not in used:
                row += 1
                missing = Rejected(Reason.image_missing, "no image of this name is beside it")
                yield Found(row, unit.label(name), missing)
    for name in passed_over:
        kept = sidecars[name.rpartition(".")[0]][extension(name)]
        if not _is_same(unit, name, kept):
            row += 1
            yield Found(row, unit.label(name), malformed(f"{kept} is read in its place, and says something else"))


def _listed(unit: Unit, captions: str, source: SourceConfig) -> Iterator[Found]:
    """What a captions file lists. One that cannot be read is a row, so that the images below it are still read."""
    row = 0
    try:
        for found in (read_csv if extension(captions) == "csv" else read_jsonl)(unit, source.fields):
            row = found.row
            yield found
    except UNREADABLE as error:
        yield Found(row + 1, unit.label(captions), unreadable(error))


def _is_same(unit: Unit, one: str, other: str) -> bool:
    bodies = []
    for name in (one, other):
        try:
            with open_stream(unit.uri, name) as stream:
                bodies.append(stream.read())
        except UNREADABLE:
            return False
    return bodies[0] == bodies[1]


def _beside(name: str, sidecars: Mapping[str, Mapping[str, str]], frames: bool) -> dict[str, str]:
    """Extension → file of what belongs to an image, cat.txt or cat.jpg.txt, or to a folder of frames."""
    if not frames:
        return {**sidecars.get(name.rpartition(".")[0], {}), **sidecars.get(name, {})}
    inside = [kinds for stem, kinds in sidecars.items() if posixpath.dirname(stem) == name and stem != name]
    found: dict[str, str] = {}
    for kind in SIDECARS:
        those = [kinds[kind] for kinds in inside if kind in kinds]
        if len(those) == 1:
            found[kind] = those[0]
    return {**found, **(sidecars.get(name, {}) if name else {})}


def _in_order(names: Iterable[str]) -> list[str]:
    """By name, with the numbers in names as numbers: frame 10 stands behind frame 9."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in NUMBER.split(name)])


def _folders_above(name: str) -> Iterator[str]:
    while name:
        name = posixpath.dirname(name)
        yield name


def _group(name: str, frames: bool) -> str:
    """The first folder in the path of a record; empty for those of the source's own folder."""
    record = posixpath.dirname(name) if frames and is_image(name) else name
    return record.partition("/")[0] if "/" in record else ""


def _parts(files: Sequence[File], frames: bool) -> Iterator[list[File]]:
    """Runs of at most `FILES_PER_UNIT`, with what belongs to one record in one run."""
    records: defaultdict[str, list[File]] = defaultdict(list)
    for file in files:
        records[_record(file.name, frames)].append(file)
    part: list[File] = []
    for name in sorted(records, key=lambda name: name.split("/")):
        if part and len(part) + len(records[name]) > FILES_PER_UNIT:
            yield part
            part = []
        part += records[name]
    if part:
        yield part


def _record(name: str, frames: bool) -> str:
    folder = posixpath.dirname(name)
    if frames and is_image(name):
        return folder
    stem = name.rpartition(".")[0]
    while is_image(stem):  # cat.jpg.txt
        stem = stem.rpartition(".")[0]
    return stem


def _unit(unit: Unit, name: str, files: Sequence[File]) -> Unit:
    """Of images name and size stand for the content, as their bytes are read once only; of the rest it is the content.

    In an object store it is the time of writing too.
    """
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.modified}\0".encode("utf-8", "surrogateescape"))
    if local_path(unit.uri) is not None:
        digest.update(fingerprint(unit.uri, [file.name for file in files if not is_image(file.name)]).encode())
    records = sum(is_image(file.name) for file in files)
    names = tuple(file.name for file in files)
    return replace(unit, name=unit.label(name), files=names, fingerprint=digest.hexdigest(), records=records)
