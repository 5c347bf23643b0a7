"""The rows of a held-out split as examinations read them, the same for every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import MisuseError
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.loading.text import QUESTIONS


@dataclass(frozen=True)
class Captions:
    """All captions of a split in one language, in the order of its rows; a picture may have several."""

    texts: tuple[str, ...]
    rows: NDArray[np.int64]  # of each text, the row of the split that it describes

    @cached_property
    def pictures(self) -> NDArray[np.int64]:
        """The rows that have a caption, ascending."""
        return np.unique(self.rows)

    @cached_property
    def picture_of_text(self) -> NDArray[np.int64]:
        """Of each text, the place of its row among `pictures`."""
        return np.searchsorted(self.pictures, self.rows).astype(np.int64)

    @cached_property
    def texts_of_picture(self) -> list[list[str]]:
        """Of each of `pictures`, its texts."""
        found: list[list[str]] = [[] for _ in self.pictures]
        for text, picture in zip(self.texts, self.picture_of_text, strict=True):
            found[picture].append(text)
        return found


@dataclass(frozen=True)
class Question:
    """A question about the picture of a row, and what people answered."""

    row: int
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """A held-out split."""

    split: str
    samples: tuple[Sample, ...]
    captions: Mapping[str, Captions]  # by language

    def labels(self, label: str) -> list[str | None]:
        """The class of each row, None where it has none."""
        found: list[str | None] = []
        for sample in self.samples:
            classes = sample.metadata.get("classes")
            found.append(classes.get(label) if isinstance(classes, dict) else None)
        return found

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Every question that somebody answered. Raises MisuseError where there is none."""
        found = []
        for row, sample in enumerate(self.samples):
            asked = sample.metadata.get(QUESTIONS)
            for each in asked if isinstance(asked, list) else ():
                if isinstance(each, dict) and isinstance(each.get("question"), str) and each.get("answers"):
                    found.append(Question(row, each["question"], tuple(map(str, each["answers"]))))
        if not found:
            raise MisuseError(
                f"evaluate.answering: no answered question in split {self.split!r}; its samples' metadata need "
                '"questions": [{"question": "…", "answers": ["…"]}, …]'
            )
        return tuple(found)


def read_rows(dataset: Dataset, split: str, languages: Sequence[str], *, captions: bool = True) -> Rows:
    """A split's samples and their captions. Raises MisuseError where `captions` are wanted and a language has none."""
    samples = tuple(Reader(dataset, split))
    found = {}
    for language in languages:
        pairs = [
            (row, caption.text)
            for row, sample in enumerate(samples)
            for caption in sample.captions
            if caption.language == language
        ]
        if captions and not pairs:
            raise MisuseError(f"evaluate.languages: no caption in {language!r} in split {split!r} of {dataset.uri}")
        found[language] = Captions(
            tuple(text for _, text in pairs), np.array([row for row, _ in pairs], dtype=np.int64)
        )
    return Rows(split, samples, found)
