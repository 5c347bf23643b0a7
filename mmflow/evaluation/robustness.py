"""What changed captions and pictures do to a model: which changes it notices, and which mislead it.

Other words, and a missing caption or picture, are measured by how often the model prefers the true pair (`preference`);
typos and corrupted pictures, which leave the meaning, by the retrieval that they cost (`recall_drop`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmflow.core.config import Config
from mmflow.evaluation.examination import Examination, Metrics, Outcome, Subject
from mmflow.imaging.corruptions import CORRUPTIONS, Corruption, Severity
from mmflow.inference.changes import MISSING, PERTURBATIONS, Perturbation
from mmflow.inference.result import Gives, Result
from mmflow.inference.tasks.embed import SPACE, AllCaptionEmbeddings, ImageEmbeddings
from mmflow.learning.retrieval import RECALL_AT

# Shapes: A captions, N captions or pictures that have a change.

# --- metrics --------------------------------------------------------------------------------------------------------


def preference(true_N: NDArray[np.floating], changed_N: NDArray[np.floating]) -> dict[str, float]:
    """{"accuracy", "rows"}: the share of pairs where the true one scores above its changed one, as ARO and SugarCrepe
    count it, and the number of pairs.

    Scores are those of a picture with its own caption, and with either of them changed. Guessing reaches 0.5. Ties and
    NaN count against the model, so one that reads no word order has 0, not 0.5. 0 without a pair.
    """
    return {"accuracy": float((true_N > changed_N).mean()) if len(true_N) else 0.0, "rows": float(len(true_N))}


def recall_drop(
    clean_N: NDArray[np.integer], changed_N: NDArray[np.integer], recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """{"R@1", "R@1_drop", …, "rows"} from the ranks of the same queries before and after a change.

    R@k is that after the change. Its drop is the share of the clean R@k that is lost (the MultiModal Impact score of
    arXiv 2212.08044): 0 where nothing is, 1 where all is, below 0 where the change helped. 0 where there was nothing to
    lose.
    """
    metrics: dict[str, float] = {}
    for k in recall_at:
        before, after = (float((ranks <= k).mean()) if len(ranks) else 0.0 for ranks in (clean_N, changed_N))
        metrics |= {f"R@{k}": after, f"R@{k}_drop": 1 - after / before if before else 0.0}
    return metrics | {"rows": float(len(changed_N))}


# --- the examination ------------------------------------------------------------------------------------------------


class RobustnessConfig(Config):
    """Retrieval of corrupted pictures and misspelt captions, and true captions against changed ones."""

    pictures: list[Corruption] = Field(default_factory=lambda: list(CORRUPTIONS))
    """How pictures are corrupted (ImageNet-C, arXiv 1903.12261)."""
    severity: Severity = 3
    """Of the corruptions."""
    captions: list[Perturbation] = Field(default_factory=lambda: list(PERTURBATIONS))
    """How captions are changed (ARO, arXiv 2210.01936; SugarCrepe, arXiv 2306.14610)."""


def _changes(section: RobustnessConfig) -> dict[str, str]:
    return {name: f"{name}-{section.severity}" for name in section.pictures}


def _asks(section: RobustnessConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return (
        ImageEmbeddings(),
        AllCaptionEmbeddings(language=languages[0]),
        *(ImageEmbeddings(change=change) for change in (*_changes(section).values(), MISSING)),
        *(AllCaptionEmbeddings(language=languages[0], change=change) for change in section.captions),
    )


def _change(subject: Subject, section: RobustnessConfig) -> Outcome:
    captions, texts_AW = subject.rows.main_captions, subject.captions_AW
    own_AW = subject.image_embeddings()[captions.rows]
    true_A = (own_AW * texts_AW).sum(axis=1)
    metrics: Metrics = {}
    for name, change in _changes(section).items():
        ranks = subject.ranks_of(captions, texts_AW, change)
        metrics[name] = recall_drop(subject.ranks.image_to_text.ranks, ranks.image_to_text.ranks)
    missing_A = (subject.image_embeddings(MISSING)[captions.rows] * texts_AW).sum(axis=1)
    metrics["missing_picture"] = preference(true_A, missing_A)
    for kind in section.captions:
        changed_AW = subject.caption_embeddings(AllCaptionEmbeddings(language=subject.language, change=kind))
        changed_A = ~np.isnan(changed_AW[:, 0])
        if kind == "typos":
            mixed_AW = np.where(changed_A[:, None], changed_AW, texts_AW)
            ranks = subject.ranks_of(captions, mixed_AW)
            before, after = (found.text_to_image.ranks[changed_A] for found in (subject.ranks, ranks))
            metrics[kind] = recall_drop(before, after)
        else:
            wrong_A = (own_AW * changed_AW).sum(axis=1)
            name = "missing_caption" if kind == "missing" else kind
            metrics[name] = preference(true_A[changed_A], wrong_A[changed_A])
    return Outcome({"robustness": metrics})


ROBUSTNESS = Examination(needs=ImageEmbeddings.needs, remedy=SPACE, asks=_asks, examine=_change)
