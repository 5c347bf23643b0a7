"""A model's examination on held-out splits, the same rows for every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmflow.errors import MisuseError
from mmflow.evaluation.config import ZeroShotConfig
from mmflow.evaluation.retrieval import chance_metrics, ranks_of_right, retrieval_metrics
from mmflow.evaluation.zero_shot import class_embeddings, majority_metrics, zero_shot_metrics
from mmflow.loading.reader import Reader, Sample
from mmflow.models.embed import Embeddings, embed_captions, embed_images
from mmflow.models.package import LoadedModel
from mmflow.shards.dataset import Dataset

GRID_RESULTS = 5

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of a held-out split, and those that have a caption in each language."""

    split: str
    samples: tuple[Sample, ...]
    captions: Mapping[str, tuple[str, ...]]  # language → caption of each row that has one
    rows: Mapping[str, NDArray[np.int64]]  # language → those rows

    @property
    def keys(self) -> list[str]:
        return [sample.key for sample in self.samples]

    def labels(self, label: str) -> list[str | None]:
        """The class of each row, None where it has none."""
        found: list[str | None] = []
        for sample in self.samples:
            classes = sample.metadata.get("classes")
            found.append(classes.get(label) if isinstance(classes, dict) else None)
        return found


def read_rows(dataset: Dataset, split: str, languages: Sequence[str]) -> Rows:
    """A split's samples and captions. Raises MisuseError where a language has no caption there."""
    samples = tuple(Reader(dataset, split))
    captions, rows = {}, {}
    for language in languages:
        first = [next((each.text for each in sample.captions if each.language == language), None) for sample in samples]
        captions[language] = tuple(caption for caption in first if caption is not None)
        rows[language] = np.array([row for row, caption in enumerate(first) if caption is not None], dtype=np.int64)
        if not captions[language]:
            raise MisuseError(f"evaluate.languages: no caption in {language!r} in split {split!r} of {dataset.uri}")
    return Rows(split, samples, captions, rows)


@dataclass(frozen=True)
class Examination:
    """What came of one model on one split."""

    metrics: Metrics
    ranks: NDArray[np.int64]  # of the right picture for each caption of the first language
    best: NDArray[np.int64]  # (captions, GRID_RESULTS): the nearest pictures, as rows of `Rows.rows[first language]`
    scores: NDArray[np.float32]  # their cosines


def examine(loaded: LoadedModel, rows: Rows, zero_shot: ZeroShotConfig | None, batch_size: int) -> Examination:
    """Retrieval in both directions in the first language, text to image in the others, and zero-shot classes."""
    images = embed_images(loaded, rows.samples, batch_size)
    first, *others = rows.captions
    similarity = _similarity(loaded, rows, first, images, batch_size)
    ranks = ranks_of_right(similarity)
    metrics: Metrics = {
        "text_to_image": retrieval_metrics(ranks),
        "image_to_text": retrieval_metrics(ranks_of_right(similarity.T)),
        "languages": {
            language: {
                "text_to_image": retrieval_metrics(
                    ranks_of_right(_similarity(loaded, rows, language, images, batch_size))
                )
            }
            for language in others
        },
    }
    if zero_shot is not None:
        classes = class_embeddings(loaded, zero_shot.prompts, batch_size)
        metrics["zero_shot"] = zero_shot_metrics(images, classes, list(zero_shot.prompts), rows.labels(zero_shot.label))
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :GRID_RESULTS]
    return Examination(metrics, ranks, best, np.take_along_axis(similarity, best, axis=1))


def _similarity(loaded: LoadedModel, rows: Rows, language: str, images: Embeddings, batch_size: int) -> Embeddings:
    # (captions, pictures) of the rows that have a caption in this language
    captions = embed_captions(loaded, rows.captions[language], batch_size)
    similarity: Embeddings = captions @ images[rows.rows[language]].T
    return similarity


def chance(rows: Rows, zero_shot: ZeroShotConfig | None) -> Metrics:
    """What guessing, or the commonest class, would give on the same rows."""
    languages = list(rows.captions)
    by_language = {language: chance_metrics(len(rows.rows[language])) for language in languages}
    metrics: Metrics = {
        "text_to_image": by_language[languages[0]],
        "image_to_text": by_language[languages[0]],
        "languages": {language: {"text_to_image": by_language[language]} for language in languages[1:]},
    }
    if zero_shot is not None:
        metrics["zero_shot"] = majority_metrics(list(zero_shot.prompts), rows.labels(zero_shot.label))
    return metrics


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as one level: {"unseen_variants/text_to_image/R@1": 0.61, …}, the names that gates use."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = float(value)
    return flat
