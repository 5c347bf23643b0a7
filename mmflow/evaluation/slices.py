"""A metric by label and by length: where a model that is good on average is bad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmflow.core.config import Config
from mmflow.evaluation.examination import Examination, Metrics, Outcome, Subject
from mmflow.inference.result import Gives, Result
from mmflow.inference.tasks.embed import SPACE, AllCaptionEmbeddings, ImageEmbeddings

LEAST_ROWS = 20  # of fewer, a share is off by more than 0.1 by chance alone (standard error √(¼/20) = 0.11)
MOST_LABELS = 40  # nobody reads a table of more
LENGTHS = (8, 16, 32, 64, 128)  # the longest of each range but the last; fixed, so that nights can be compared


class Slices(NamedTuple):
    """A metric of some parts of the rows, and how much of them is not shown."""

    values: dict[str, dict[str, float]]
    """Slice → {"value", "rows"}: the mean outcome of so many rows."""
    left_out: int
    """Slices that have rows, but too few of them or too many before them."""


def by_label(outcomes_N: NDArray[np.generic], labels: Sequence[str | None]) -> Slices:
    """The mean outcome (0 or 1, or any number) of the rows of each label, the commonest first.

    At most 40 labels; those of fewer than 20 rows are left out. Rows without a label are in no slice.
    """
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        if label is not None:
            rows.setdefault(label, []).append(row)
    commonest = sorted(rows, key=lambda label: (-len(rows[label]), label))[:MOST_LABELS]
    return _slices(outcomes_N, {label: rows[label] for label in commonest}, len(rows) - len(commonest))


def by_length(outcomes_N: NDArray[np.generic], lengths_N: NDArray[np.integer]) -> Slices:
    """The mean outcome of the rows of each range of lengths, such as "9-16", the shortest first.

    Lengths are counted from 0, in whatever unit. Ranges of fewer than 20 rows are left out.
    """
    ranges = np.searchsorted(LENGTHS, lengths_N)
    bounds = [0, *(length + 1 for length in LENGTHS)]
    names = [*(f"{first}-{last}" for first, last in zip(bounds, LENGTHS, strict=False)), f"{bounds[-1]}+"]
    rows = {name: np.flatnonzero(ranges == number).tolist() for number, name in enumerate(names)}
    return _slices(outcomes_N, {name: own for name, own in rows.items() if own}, 0)


def _slices(outcomes_N: NDArray[np.generic], rows: dict[str, list[int]], left_out: int) -> Slices:
    shown = {name: own for name, own in rows.items() if len(own) >= LEAST_ROWS}
    values = {name: {"value": float(outcomes_N[own].mean()), "rows": float(len(own))} for name, own in shown.items()}
    return Slices(values, left_out + len(rows) - len(shown))


# --- the examination ------------------------------------------------------------------------------------------------


class SlicesConfig(Config):
    """Retrieval of pictures by captions (R@10), by the length of the caption and by a label of the picture."""

    label: str | None = None
    """Field of a sample's `classes`; None: by length alone."""


def _asks(section: SlicesConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return ImageEmbeddings(), AllCaptionEmbeddings(language=languages[0])


def _slice(subject: Subject, section: SlicesConfig) -> Outcome:
    captions = subject.rows.main_captions
    hits_A = subject.ranks.text_to_image.ranks <= 10
    slices = {"tokens": by_length(hits_A, subject.lengths(captions.texts))}
    if section.label is not None:
        labels = subject.rows.labels(section.label)
        slices[section.label] = by_label(hits_A, [labels[row] for row in captions.rows])
    metrics: Metrics = {
        name: {part: {"R@10": value["value"], "rows": value["rows"]} for part, value in found.values.items()}
        for name, found in slices.items()
    }
    return Outcome({"slices": metrics})


SLICES = Examination(needs=ImageEmbeddings.needs, remedy=SPACE, asks=_asks, examine=_slice)
