"""The samples that a page shows, read by shard and row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mmflow.core.errors import MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.report.page import thumbnail

THUMBNAIL_PIXELS = 128

Place = tuple[str, int]  # shard, row


@dataclass(frozen=True)
class Shown:
    """A sample as a page shows it."""

    key: str
    captions: tuple[str, ...]
    picture: bytes | None  # JPEG; None for a picture that cannot be decoded


def read_shown(dataset: Dataset, places: Iterable[Place]) -> dict[Place, Shown]:
    """The samples at these places. Those that cannot be read are left out: a page is still worth having."""
    shards: dict[str, tuple[Reader, int]] = {}
    for split in dataset.splits:
        reader = Reader(dataset, split, frames=False)
        shards |= {shard.name: (reader, ordinal) for ordinal, shard in enumerate(reader.shards)}
    shown = {}
    for shard, row in sorted(set(places)):
        try:
            reader, ordinal = shards[shard]
            sample = reader.read(ordinal, row)
        except (MmflowError, KeyError):
            continue
        captions = tuple(caption.text for caption in sample.captions)
        shown[shard, row] = Shown(sample.key, captions, thumbnail(sample.image, THUMBNAIL_PIXELS))
    return shown
