"""What an examination is: the rows and the model it reads, and the metrics and details it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import MisuseError
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.loading.text import QUESTIONS
from mmflow.training.config import DistillConfig, PretrainConfig

if TYPE_CHECKING:
    from mmflow.inference.predict import Predictor

Gives = frozenset[str]  # what a model can be asked for: `ModelConfig.gives`
Trained = Mapping[str, PretrainConfig | DistillConfig]  # a recipe's training stages by name
Metrics = dict[str, Any]
Similarity = NDArray[np.float32]  # (captions, pictures)

# The files of an evaluation.
METRICS = "metrics.json"  # {split: {"rows", "models": {model: metrics}}}
DETAILS = "details.json"  # {model: {split: {name: what people read}}}; names are those of the examinations' details
# {model: {"latency_ms", "pictures_per_second"}}; not part of the fingerprint, because it is never the same twice
SPEED = "speed.json"

SHOWN = 24  # captions and answers that are kept for people to read
SEED = 20_190_422  # of texts drawn by nucleus sampling, the same for every model


@dataclass(frozen=True)
class Captions:
    """All captions of a split in one language, in the order of its rows; a picture may have several."""

    texts: tuple[str, ...]
    rows: NDArray[np.int64]  # (texts,): the row of the split that each text describes

    @cached_property
    def pictures(self) -> NDArray[np.int64]:
        """The rows that have a caption, ascending."""
        return np.unique(self.rows)

    @cached_property
    def picture_of_text(self) -> NDArray[np.int64]:
        """(texts,): the place of each text's row among `pictures`."""
        return np.searchsorted(self.pictures, self.rows).astype(np.int64)

    @cached_property
    def texts_of_picture(self) -> list[list[str]]:
        """The texts of each of `pictures`."""
        texts: list[list[str]] = [[] for _ in self.pictures]
        for text, picture in zip(self.texts, self.picture_of_text, strict=True):
            texts[picture].append(text)
        return texts


@dataclass(frozen=True)
class Question:
    """A question about the picture of a row, and what people answered."""

    row: int
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """A held-out split, the same for every model."""

    split: str
    samples: tuple[Sample, ...]
    captions: Mapping[str, Captions]  # by language; the first is the one that headline figures and gates use
    places: tuple[tuple[str, int], ...]  # shard and row in it, of each sample

    @property
    def main_captions(self) -> Captions:
        """Those of the first language."""
        return next(iter(self.captions.values()))

    def reference(self, row: int) -> dict[str, Any]:
        """{"key", "shard", "row"}: how details name a sample, so that its picture is found without a search."""
        shard, row_in_shard = self.places[row]
        return {"key": self.samples[row].key, "shard": shard, "row": row_in_shard}

    def labels(self, label: str) -> list[str | None]:
        """The class of each row; None where it has none."""
        classes = [sample.metadata.get("classes") for sample in self.samples]
        return [fields.get(label) if isinstance(fields, dict) else None for fields in classes]

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Every question with an answer. Raises MisuseError where there is none."""
        questions = []
        for row, sample in enumerate(self.samples):
            entries = sample.metadata.get(QUESTIONS)
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict) and isinstance(entry.get("question"), str) and entry.get("answers"):
                    questions.append(Question(row, entry["question"], tuple(map(str, entry["answers"]))))
        if not questions:
            raise MisuseError(
                f"evaluate.answering: no answered question in split {self.split!r}; its samples' metadata need "
                '"questions": [{"question": "…", "answers": ["…"]}, …]'
            )
        return tuple(questions)


def read_rows(dataset: Dataset, split: str, languages: Sequence[str], *, captions: bool = True) -> Rows:
    """A split's samples and their captions. Raises MisuseError where `captions` are needed and a language has none."""
    reader = Reader(dataset, split)
    samples = tuple(reader)
    by_language = {}
    for language in languages:
        pairs = [
            (row, caption.text)
            for row, sample in enumerate(samples)
            for caption in sample.captions
            if caption.language == language
        ]
        if captions and not pairs:
            raise MisuseError(f"evaluate.languages: no caption in {language!r} in split {split!r} of {dataset.uri}")
        texts, rows = tuple(text for _, text in pairs), np.array([row for row, _ in pairs], dtype=np.int64)
        by_language[language] = Captions(texts, rows)
    places = tuple((shard.name, row) for shard in reader.shards for row in range(shard.samples))
    return Rows(split, samples, by_language, places)


@dataclass(frozen=True)
class Subject:
    """A model and the rows that it is examined on; what several examinations read is computed once."""

    model: Predictor
    rows: Rows

    @cached_property
    def image_embeddings(self) -> Similarity | None:
        """(rows, width); None for a model that compares pair by pair."""
        return self.model.embed_images(self.rows.samples) if "embeddings" in self.model.gives else None

    def similarity_to(self, captions: Captions, max_tokens: int | None = None) -> Similarity:
        """(captions, pictures that have one): cosines, or the scores of all pairs; captions cut to `max_tokens`."""
        if self.image_embeddings is None:
            clips = [self.rows.samples[row] for row in captions.pictures]
            return self.model.score_pairs(clips, captions.texts, max_tokens)
        embedded = self.model.embed_captions(captions.texts, max_tokens)
        similarity: Similarity = embedded @ self.image_embeddings[captions.pictures].T
        return similarity

    @cached_property
    def similarity(self) -> Similarity:
        """That to whole captions in the first language."""
        return self.similarity_to(self.rows.main_captions)


@dataclass(frozen=True)
class Outcome:
    """What an examination found in one model on one split."""

    metrics: Metrics = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # for people, by the name that the report shows them under


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One way to examine a model. `section` is that of the recipe, None for one that has no settings."""

    needs: tuple[Gives, ...]
    """What the model must give: everything in one of these."""
    remedy: str
    """What a recipe must name so that its model gives it, for the error."""
    examine: Callable[[Subject, Any], Outcome]
    """(subject, section) → metrics and details."""
    chance: Callable[[Rows, Any], Metrics] = lambda rows, section: {}
    """(rows, section) → what guessing would reach, by the same names."""
    check: Callable[[Any, Trained], None] = lambda section, trained: None
    """(section, training stages): raises RecipeError for what `needs` cannot tell."""
    reads_captions: Gives | None = frozenset()
    """A model with all of these needs captions: every model by default, none for None."""
    measures: bool = True
    """False: it gives no metrics, only details, of the first split and the trained models."""

    def fits(self, gives: Gives) -> bool:
        """Whether a model can be examined in it."""
        return any(needed <= gives for needed in self.needs)


def spread(count: int, shown: int = SHOWN) -> list[int]:
    """Up to `shown` of the places 0 to count-1, evenly spread."""
    shown = min(shown, count)
    return [number * count // shown for number in range(shown)]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as one level: {"unseen_variants/text_to_image/R@1": 0.61, …}, the names that gates use.

    None, which is written for a number that is not finite, becomes NaN, and no gate lets that pass.
    """
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = math.nan if value is None else float(value)
    return flat
