"""How well classes are told apart, whoever tells them: by name (zero-shot) or by a trained head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Shapes: N rows, C classes.


def predicted(scores_NC: NDArray[np.floating]) -> NDArray[np.int64]:
    """(N,) the class with the best score; -1, which is no class, where the best is shared or one is not a number.

    A model that scores all classes alike would otherwise answer the first, and be right as often as that is common.
    """
    best_N1 = scores_NC.max(axis=1, keepdims=True, initial=-np.inf)  # NaN where any is NaN
    clear_N = (scores_NC == best_N1).sum(axis=1) == 1
    return np.where(clear_N, scores_NC.argmax(axis=1), -1).astype(np.int64)


def confusion(answers_N: NDArray[np.integer], right_N: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """(C, C + 1) counts: row the right class, column the answer, the last column no answer (-1)."""
    counts = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(counts, (right_N, answers_N), 1)  # -1 is the last column
    return counts


def class_metrics(counts: NDArray[np.integer]) -> dict[str, float]:
    """Of a confusion (C, C + 1): {"accuracy", "precision", "recall", "F1", "classes", "rows"}.

    Precision, recall and F1 are means over the classes that have rows (macro); a class that is never answered has
    precision 0. All are 0 without a row.
    """
    classes, rows = counts.shape[0], int(counts.sum())
    present = counts.sum(axis=1) > 0
    right = np.diagonal(counts).astype(np.float64)
    recall = right[present] / counts.sum(axis=1)[present]
    precision = right[present] / np.maximum(1, counts[:, :classes].sum(axis=0))[present]
    both = np.maximum(precision + recall, np.finfo(np.float64).tiny)
    f1 = 2 * precision * recall / both

    def mean(values: NDArray[np.float64]) -> float:
        return float(values.mean()) if rows else 0.0

    return {
        "accuracy": float(right.sum()) / rows if rows else 0.0,
        "precision": mean(precision),
        "recall": mean(recall),
        "F1": mean(f1),
        "classes": float(classes),
        "rows": float(rows),
    }


def majority_metrics(names: Sequence[str], labels: Sequence[str | None]) -> dict[str, float]:
    """What always answering the commonest class gives, which is the best that can be had without looking."""
    known = numbers(names, labels)
    right = known[known >= 0]
    commonest = Counter(right.tolist()).most_common(1)[0][0] if len(right) else 0
    return class_metrics(confusion(np.full(len(right), commonest), right, len(names)))


def numbers(names: Sequence[str], labels: Sequence[str | None]) -> NDArray[np.int64]:
    """(N,) the place of each label among `names`, -1 where it is not there."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([-1 if label is None else place.get(label, -1) for label in labels], dtype=np.int64)


def metrics_of(
    scores_NC: NDArray[np.floating], names: Sequence[str], labels: Sequence[str | None]
) -> tuple[dict[str, float], NDArray[np.int64]]:
    """The metrics and the confusion over the rows whose label is among `names`; scores are in that order."""
    right = numbers(names, labels)
    known = right >= 0
    counts = confusion(predicted(scores_NC)[known], right[known], len(names))
    return class_metrics(counts), counts
