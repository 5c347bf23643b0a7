"""Classification: by the names of the classes (zero-shot), or by a trained head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmflow.core.config import Config
from mmflow.core.errors import RecipeError
from mmflow.evaluation.examination import Examination, Metrics, Outcome, Rows, Subject, Trained
from mmflow.inference.result import Gives, Result
from mmflow.inference.tasks.classify import Classify
from mmflow.inference.tasks.embed import ImageEmbeddings
from mmflow.inference.tasks.zero_shot import ClassTexts, ZeroShot
from mmflow.training.config import tasks_of

# Shapes: N rows, C classes.

CONFUSION_CLASSES = 40  # nobody reads a table of more


# --- metrics --------------------------------------------------------------------------------------------------------


def clear_first(subject: Subject, result: Result, names: str, scores: str) -> list[str | None]:
    """The best class of each row; None where two share the first place, or a score is not a number.

    Otherwise a model that scores all classes alike would answer the first one, and be right as often as it is common.
    """
    best, values = subject.column(result, names).to_pylist(), subject.column(result, scores).to_pylist()
    return [
        own[0] if len(own) == 1 or theirs[0] > theirs[1] else None for own, theirs in zip(best, values, strict=True)
    ]


def confusion(answers_N: NDArray[np.integer], right_N: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """(C, C + 1) counts: a row per right class, a column per answer, no answer (-1) in the last column."""
    counts = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(counts, (right_N, answers_N), 1)  # -1 is the last column
    return counts


def class_metrics(counts: NDArray[np.integer]) -> dict[str, float]:
    """{"accuracy", "precision", "recall", "F1", "classes", "rows"} of a confusion (C, C + 1).

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
    """What always answering the commonest class reaches: the best that is possible without looking."""
    known = numbers(names, labels)
    right = known[known >= 0]
    commonest = Counter(right.tolist()).most_common(1)[0][0] if len(right) else 0
    return class_metrics(confusion(np.full(len(right), commonest), right, len(names)))


def numbers(names: Sequence[str], labels: Sequence[str | None]) -> NDArray[np.int64]:
    """(N,) the place of each label among `names`; -1 for a label that is not there."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([-1 if label is None else place.get(label, -1) for label in labels], dtype=np.int64)


def metrics_of(
    answers: Sequence[str | None], names: Sequence[str], labels: Sequence[str | None]
) -> tuple[dict[str, float], NDArray[np.int64]]:
    """The metrics and the confusion over the rows with a label among `names`."""
    right = numbers(names, labels)
    known = right >= 0
    counts = confusion(numbers(names, answers)[known], right[known], len(names))
    return class_metrics(counts), counts


# --- by the names of the classes ------------------------------------------------------------------------------------


class ZeroShotConfig(ClassTexts):
    """Classes told apart by their names alone. Samples of other classes are left out."""

    label: str
    """Field of a sample's `classes` that holds the right class."""

    @property
    def task(self) -> ZeroShot:
        """What is asked of the model."""
        return ZeroShot(prompts=self.prompts, templates=self.templates)


def _asks_names(section: ZeroShotConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return ImageEmbeddings(), section.task


def _by_name(subject: Subject, section: ZeroShotConfig) -> Outcome:
    """A picture belongs to the class with the nearest description (CLIP, arXiv 2103.00020, section 3.1.2)."""
    answers = clear_first(subject, section.task, "classes", "class_similarity")
    metrics, _ = metrics_of(answers, list(section.prompts), subject.rows.labels(section.label))
    return Outcome({"zero_shot": zero_shot_metrics(metrics)})


def zero_shot_metrics(metrics: Mapping[str, float]) -> Metrics:
    """{"accuracy", "mean_class_accuracy", "classes", "rows"} from those of `class_metrics`."""
    names = {"accuracy": "accuracy", "mean_class_accuracy": "recall", "classes": "classes", "rows": "rows"}
    return {name: metrics[source] for name, source in names.items()}


ZERO_SHOT = Examination(
    needs=ZeroShot.needs,
    remedy=ZeroShot.remedy,
    asks=_asks_names,
    examine=_by_name,
    chance=lambda rows, section: {
        "zero_shot": zero_shot_metrics(majority_metrics(list(section.prompts), rows.labels(section.label)))
    },
    reads_captions=None,
)


# --- by the head `classes` ------------------------------------------------------------------------------------------


class ClassificationConfig(Config):
    """The classes that the model's head `classes` tells apart."""

    label: str
    """Field of a sample's `classes` that holds the right class; the one that the model was trained on."""


def _asks_head(section: ClassificationConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return (Classify(language=languages[0]),)


def _by_head(subject: Subject, section: ClassificationConfig) -> Outcome:
    rows = subject.rows
    answers = clear_first(subject, Classify(language=subject.language), "labels", "label_odds")
    labels = rows.labels(section.label)
    # The model never answers a class that it was not taught, but rows of that class count.
    taught = subject.vocabulary[1]
    names = [*taught, *sorted({label for label in labels if label is not None} - set(taught))]
    metrics, counts = metrics_of(answers, names, labels)
    shown = len(names) <= CONFUSION_CLASSES
    return Outcome(
        {"classification": metrics},
        {"confusion": {"classes": names, "counts": counts.tolist()}} if shown else {},
    )


def _chance_by_head(rows: Rows, section: ClassificationConfig) -> Metrics:
    labels = rows.labels(section.label)
    names = sorted({label for label in labels if label is not None})
    return {"classification": majority_metrics(names, labels)}


def _check_label(section: ClassificationConfig, trained: Trained) -> None:
    """Raise RecipeError where no trained head tells these classes apart."""
    taught = {
        task.key: task.loader.label
        for stage, training in trained.items()
        if "classes" in training.model.heads
        for task in tasks_of(stage, training)
    }
    if section.label not in taught.values():
        key, label = next(iter(taught.items()))
        raise RecipeError(
            f"evaluate.classification.label: {section.label}, and {key}.loader.label is {label or 'not set'}; make "
            "them equal, or leave classification out"
        )


CLASSIFICATION = Examination(
    needs=Classify.needs,
    remedy=Classify.remedy,
    asks=_asks_head,
    examine=_by_head,
    chance=_chance_by_head,
    check=_check_label,
    reads_captions=Gives({"fused"}),
)
