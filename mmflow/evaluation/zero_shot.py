"""Classification by the classes' names: a picture belongs to the class whose description is nearest (CLIP, arXiv
2103.00020, section 3.1.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmflow.models.embed import Embeddings, embed_captions
from mmflow.models.package import LoadedModel


def class_embeddings(loaded: LoadedModel, prompts: Mapping[str, Sequence[str]], batch_size: int) -> Embeddings:
    """(classes, width), of unit length: the mean over each class's prompts, in the order of `prompts`."""
    means = np.stack([embed_captions(loaded, texts, batch_size).mean(axis=0) for texts in prompts.values()])
    unit: Embeddings = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def zero_shot_metrics(
    images: Embeddings, classes: Embeddings, names: Sequence[str], labels: Sequence[str | None]
) -> dict[str, float]:
    """{"accuracy", "mean_class_accuracy", "classes", "rows"} over the rows whose label is among `names`."""
    known = [row for row, label in enumerate(labels) if label in names]
    if not known:
        return {"accuracy": 0.0, "mean_class_accuracy": 0.0, "classes": float(len(names)), "rows": 0.0}
    right: NDArray[np.int64] = np.array([names.index(str(labels[row])) for row in known])
    correct = (images[known] @ classes.T).argmax(axis=1) == right
    per_class = [correct[right == each].mean() for each in np.unique(right)]
    return {
        "accuracy": float(correct.mean()),
        "mean_class_accuracy": float(np.mean(per_class)),
        "classes": float(len(names)),
        "rows": float(len(known)),
    }


def majority_metrics(names: Sequence[str], labels: Sequence[str | None]) -> dict[str, float]:
    """What always answering the commonest class gives, which is the best that can be had without looking."""
    counts = Counter(label for label in labels if label in names)
    rows = counts.total()
    return {
        "accuracy": counts.most_common(1)[0][1] / rows if rows else 0.0,
        "mean_class_accuracy": 1 / max(1, len(counts)),
        "classes": float(len(names)),
        "rows": float(rows),
    }
