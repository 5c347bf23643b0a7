"""Classification: by the names of the classes (zero-shot), or by a trained head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from mmflow.core.config import Config
from mmflow.core.errors import RecipeError
from mmflow.evaluation.examination import Examination, Gives, Metrics, Outcome, Rows, Subject, Trained
from mmflow.training.config import tasks_of

# Shapes: N rows, C classes.

CONFUSION_CLASSES = 40  # nobody reads a table of more


# --- metrics --------------------------------------------------------------------------------------------------------


def predicted(scores_NC: NDArray[np.floating]) -> NDArray[np.int64]:
    """(N,) the class with the best score; -1 where several share it or one score is not a number.

    Otherwise a model that scores all classes alike would answer the first one, and be right as often as it is common.
    """
    best_N1 = scores_NC.max(axis=1, keepdims=True, initial=-np.inf)  # NaN where any is NaN
    clear_N = (scores_NC == best_N1).sum(axis=1) == 1
    return np.where(clear_N, scores_NC.argmax(axis=1), -1).astype(np.int64)


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
    scores_NC: NDArray[np.floating], names: Sequence[str], labels: Sequence[str | None]
) -> tuple[dict[str, float], NDArray[np.int64]]:
    """The metrics and the confusion over the rows with a label among `names`, which is the order of the scores."""
    right = numbers(names, labels)
    known = right >= 0
    counts = confusion(predicted(scores_NC)[known], right[known], len(names))
    return class_metrics(counts), counts


# --- by the names of the classes ------------------------------------------------------------------------------------


class ZeroShotConfig(Config):
    """Classes told apart by their names alone."""

    label: str
    """Field of a sample's `classes` that holds the right class."""
    prompts: dict[str, list[str]] = Field(min_length=2)
    """Class → texts that describe it; their embeddings are averaged. Samples of other classes are left out."""
    templates: list[str] = Field(default_factory=lambda: ["{}"], min_length=1)
    """Sentences that each of these texts is put into in place of {}, such as "a photo of a {}"; their embeddings are
    averaged too."""

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the text to stand in")
        return templates

    @property
    def texts(self) -> dict[str, list[str]]:
        """Class → every one of its texts in every template."""
        return {
            name: [template.replace("{}", text) for template in self.templates for text in texts]
            for name, texts in self.prompts.items()
        }


def _by_name(subject: Subject, section: ZeroShotConfig) -> Outcome:
    """A picture belongs to the class with the nearest description (CLIP, arXiv 2103.00020, section 3.1.2)."""
    images, classes = subject.image_embeddings, subject.model.embed_classes(section.texts)
    assert images is not None, "`needs` asks for embeddings"
    metrics, _ = metrics_of(images @ classes.T, list(section.prompts), subject.rows.labels(section.label))
    return Outcome({"zero_shot": zero_shot_metrics(metrics)})


def zero_shot_metrics(metrics: Mapping[str, float]) -> Metrics:
    """{"accuracy", "mean_class_accuracy", "classes", "rows"} from those of `class_metrics`."""
    names = {"accuracy": "accuracy", "mean_class_accuracy": "recall", "classes": "classes", "rows": "rows"}
    return {name: metrics[source] for name, source in names.items()}


ZERO_SHOT = Examination(
    needs=(Gives({"embeddings"}),),
    remedy="a text encoder and an embedding_width",
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


def _by_head(subject: Subject, section: ClassificationConfig) -> Outcome:
    model, rows, captions = subject.model, subject.rows, subject.rows.main_captions
    # A fusion reads each picture with its first caption, and with nothing where it has none.
    own = dict(zip(captions.pictures.tolist(), captions.texts_of_picture, strict=True))
    texts = [own.get(row, [""])[0] for row in range(len(rows.samples))] if "fused" in model.gives else None
    scores = model.class_scores(rows.samples, texts)
    labels = rows.labels(section.label)
    # The model never answers a class that it was not taught, but rows of that class count.
    untaught = sorted({label for label in labels if label is not None} - set(model.loaded.classes))
    names = [*model.loaded.classes, *untaught]
    scores = np.pad(scores, ((0, 0), (0, len(untaught))), constant_values=-np.inf)
    metrics, counts = metrics_of(scores, names, labels)
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
    needs=(Gives({"class_logits"}),),
    remedy="the head classes",
    examine=_by_head,
    chance=_chance_by_head,
    check=_check_label,
    reads_captions=Gives({"fused"}),
)
