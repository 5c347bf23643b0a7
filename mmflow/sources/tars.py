"""WebDataset tars of others to records: members of one key that stand together are a sample."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO

from mmflow.core.listing import IMAGE_EXTENSIONS, open_stream
from mmflow.sources.config import FieldsConfig
from mmflow.sources.fields import Fields
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import Found
from mmflow.sources.sidecars import SIDECARS, fields_of_sidecars
from mmflow.sources.tarstream import MAX_MEMBER_BYTES, Damage, read_members, split_name
from mmflow.sources.units import Unit

HELD_SAMPLES = 4
FRAME = re.compile(r"(?:.*\.)?(\d+)\.\w+")  # 001.jpg, frame.001.jpg


@dataclass
class Sample:
    """Members that stand together: extension → size, and the bodies that were read."""

    key: str
    hurt: bool  # beside damage: there may have been more
    sizes: dict[str, int] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)


def read_webdataset(unit: Unit, names: FieldsConfig) -> Iterator[Found]:
    """The records of a tar. Each damage is one row with source_damaged."""
    label = unit.label(unit.files[0])
    with open_stream(unit.uri, unit.files[0]) as stream:
        for row, (key, what) in enumerate(read_samples(stream, names)):
            yield Found(row, f"{label}:{key}" if key else label, what)


def read_samples(stream: IO[bytes], names: FieldsConfig) -> Iterator[tuple[str | None, Fields | Rejected]]:
    """(key, record) of each sample of a tar, in order; without a key: damage.

    A sample beside damage is kept if it has the members of the last whole one; if not, it is part of the damage, whose
    detail names it.
    """
    whole: frozenset[str] | None = None  # extensions of the last sample that no damage touches
    damages: list[Damage] = []
    lost: list[str] = []
    held: list[Sample] = []  # at the beginning, until there is a whole one to compare with
    for sample in _samples(stream):
        if isinstance(sample, Damage):
            damages.append(sample)
        elif not sample.hurt:
            whole = frozenset(sample.sizes)
            yield from _whole_ones(held, whole, names, lost)
            yield from _verdicts(damages, lost)
            damages, lost, held = [], [], []
            yield sample.key, _record(sample, names)
        elif whole is not None:
            yield from _whole_ones([sample], whole, names, lost)
        elif len(held) < HELD_SAMPLES:
            held.append(sample)
        else:
            lost.append(sample.key)
    lost[:0] = [sample.key for sample in held]
    yield from _verdicts(damages, lost)


def _whole_ones(
    samples: list[Sample], whole: frozenset[str], names: FieldsConfig, lost: list[str]
) -> Iterator[tuple[str, Fields | Rejected]]:
    for sample in samples:
        if whole <= sample.sizes.keys():
            yield sample.key, _record(sample, names)
        else:
            lost.append(sample.key)


def _samples(stream: IO[bytes]) -> Iterator[Sample | Damage]:
    """Samples, and damage before the sample that it was met in."""
    sample: Sample | None = None
    hurt = False
    for member in read_members(stream, _is_wanted):
        split = split_name(member.name) if member.name is not None else None
        if isinstance(member, Damage):
            yield member
            if sample is not None and (split is None or split[0] == sample.key):
                sample.hurt = True
            hurt = True
            continue
        if split is None:
            continue
        key, extension = split
        if sample is None or key != sample.key or extension in sample.sizes:
            if sample is not None:
                yield sample
            sample, hurt = Sample(key, hurt), False
        sample.sizes[extension] = member.size
        if member.body is not None:
            sample.bodies[extension] = member.body
    if sample is not None:
        yield sample


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _is_wanted(name: str) -> bool:
    split = split_name(name)
    return split is not None and (split[1] in SIDECARS or _is_image(split[1]))


def _record(sample: Sample, names: FieldsConfig) -> Fields | Rejected:
    images = _images(sample)
    for extension in (*images, *SIDECARS):
        if sample.sizes.get(extension, 0) > MAX_MEMBER_BYTES:
            reason = Reason.image_too_large if extension in images else Reason.record_malformed
            return Rejected(reason, f".{extension} has {sample.sizes[extension]} bytes, at most {MAX_MEMBER_BYTES}")
    try:
        fields = fields_of_sidecars(sample.bodies, names)
    except Rejected as rejected:
        return rejected
    missing = f"no image among its members: {', '.join(sample.sizes)}"
    return replace(fields, key=sample.key, bodies=[sample.bodies[each] for each in images], no_image=missing)


def _images(sample: Sample) -> list[str]:
    """The extensions of its images: one, or the frames of a clip in the order of their numbers."""
    first = [each for each in IMAGE_EXTENSIONS if each in sample.sizes][:1]
    nested = [each for each in sample.sizes if "." in each and _is_image(each)]
    frames = sorted((int(match[1]), each) for each in nested if (match := FRAME.fullmatch(each)))
    return first + [each for _, each in frames] or nested[:1]


def _verdicts(damages: list[Damage], lost: list[str]) -> Iterator[tuple[None, Rejected]]:
    for damage in damages:
        samples = f"; not whole: {', '.join(lost)}" if lost else ""
        yield None, Rejected(Reason.source_damaged, f"byte {damage.offset}: {damage.what}{samples}")
        lost = []
