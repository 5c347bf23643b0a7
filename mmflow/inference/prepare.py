"""Rows of a shard as a model takes them: read, checked, decoded. This runs beside the model, in threads or in Ray
tasks, so that an accelerator does not wait for a JPEG. A row that cannot be read has its error; the others are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import CorruptArtifactError
from mmflow.dataset.opened import open_dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.imaging.decode import Pixels, decode
from mmflow.inference.changes import changed
from mmflow.loading.transforms import centre_view, choose_frames

# Shapes: G rows without an error, F frames, S side of a picture in pixels.

OPEN_READERS = 4  # datasets and splits that a process has open


@dataclass(frozen=True)
class Looks:
    """How pictures are looked at: their centre view, as it is or changed."""

    side: int  # of the view, in pixels
    max_frames: int = 0  # of a clip; 0: its first picture alone
    changes: tuple[str, ...] = ()  # as in `inference/changes.py`, "" for none; (): pictures are not read


@dataclass(frozen=True)
class Rows:
    """Rows first…stop-1 of a shard, by its place among those of its split."""

    dataset: str
    fingerprint: str  # of the dataset: another may have taken its place
    split: str
    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class Prepared:
    """Some rows of a shard, ready for the model."""

    keys: list[str]  # of all rows
    errors: list[str | None]  # of all rows
    damaged: int  # rows that are not what was committed, so another attempt may go well
    good: NDArray[np.int64]  # (G,): the places of the rows without an error
    samples: list[Sample]  # of these, without pictures
    pixels: dict[str, NDArray[np.uint8]]  # change → (sum of `frames`, S, S, 3)
    frames: NDArray[np.int64]  # (G,): the frames of each
    texts: Prepared | None = None  # the rows as they are read without pictures, where some picture fails


def prepare(rows: Rows, looks: Looks) -> Prepared:
    """Read and decode some rows. Raises MissingArtifactError or CorruptArtifactError for a shard as a whole."""
    prepared = _prepare(rows, looks)
    if prepared.damaged:
        _reader.cache_clear()  # the shard may have been restored since it was opened, as another file
        prepared = _prepare(rows, looks)
    if looks.changes and any(prepared.errors):
        prepared = replace(prepared, texts=_prepare(rows, replace(looks, changes=())))
    return prepared


def _prepare(rows: Rows, looks: Looks) -> Prepared:
    reader = _reader(rows.dataset, rows.fingerprint, rows.split, looks.max_frames > 0)
    prepared = Prepared([], [], 0, np.zeros(0, np.int64), [], {}, np.zeros(0, np.int64))
    good, frames, damaged = [], [], 0
    views: dict[str, list[Pixels]] = {change: [] for change in looks.changes}
    for attempt in reader.attempts(rows.shard, rows.first, rows.stop, image=bool(looks.changes)):
        prepared.keys.append(attempt.key)
        error = attempt.error
        damaged += error is not None
        if attempt.sample is not None:
            try:
                clip = decode_views(attempt.sample, looks) if looks.changes else []
            except CorruptArtifactError as undecodable:
                error = undecodable
            else:
                good.append(attempt.row - rows.first)
                frames.append(len(clip))
                prepared.samples.append(replace(attempt.sample, image=b"", frames=()))
                for change, made in views.items():
                    made += changed(clip, change, attempt.key)
        prepared.errors.append(None if error is None else str(error).split("; ")[0])
    return replace(
        prepared,
        damaged=damaged,
        good=np.array(good, np.int64),
        frames=np.array(frames, np.int64),
        pixels={
            change: np.stack(made) if made else np.zeros((0, looks.side, looks.side, 3), np.uint8)
            for change, made in views.items()
        },
    )


def decode_views(sample: Sample, looks: Looks) -> list[Pixels]:
    """The centre views, (S, S, 3): of the picture, or of frames evenly spread over the clip. Raises
    CorruptArtifactError."""
    bodies: Sequence[bytes] = [sample.image]
    if looks.max_frames:
        clip = (sample.image, *sample.frames)
        bodies = [clip[number] for number in choose_frames(len(clip), looks.max_frames)]
    return [centre_view(decode(body, sample.extension, looks.side), looks.side) for body in bodies]


@lru_cache(OPEN_READERS)
def _reader(dataset: str, fingerprint: str, split: str, frames: bool) -> Reader:
    return Reader(open_dataset(dataset), split, frames=frames)
