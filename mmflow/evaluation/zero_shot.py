"""Classification by the classes' names: a picture belongs to the class whose description is nearest (CLIP, arXiv
2103.00020, section 3.1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmflow.evaluation import classification
from mmflow.inference.embed import Embeddings


def zero_shot_metrics(
    images: Embeddings, classes: Embeddings, names: Sequence[str], labels: Sequence[str | None]
) -> dict[str, float]:
    """{"accuracy", "mean_class_accuracy", "classes", "rows"} over the rows whose label is among `names`."""
    metrics, _ = classification.metrics_of(images @ classes.T, names, labels)
    return _reported(metrics)


def majority_metrics(names: Sequence[str], labels: Sequence[str | None]) -> dict[str, float]:
    """What always answering the commonest class gives, which is the best that can be had without looking."""
    return _reported(classification.majority_metrics(names, labels))


def _reported(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        "accuracy": metrics["accuracy"],
        "mean_class_accuracy": metrics["recall"],
        "classes": metrics["classes"],
        "rows": metrics["rows"],
    }
