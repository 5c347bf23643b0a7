"""What changed captions and corrupted pictures do to a model: which changes it notices, and which mislead it.

Other words, and a missing caption or picture, are measured by how often the model prefers the true pair (`preference`);
typos and corrupted pictures, which leave the meaning, by the retrieval that they cost (`recall_drop`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmflow.evaluation.perturbations import shuffled_words, typos
from mmflow.evaluation.swaps import swapped_attributes, swapped_objects
from mmflow.learning.retrieval import RECALL_AT

# Shapes: N captions or pictures that have a change.

Perturbation = Literal["typos", "shuffled_words", "swapped_attributes", "swapped_objects", "missing"]

PERTURBATIONS: dict[Perturbation, Callable[[str], str | None]] = {
    "typos": typos,
    "shuffled_words": shuffled_words,
    "swapped_attributes": swapped_attributes,
    "swapped_objects": swapped_objects,
    "missing": lambda caption: "" if caption else None,
}
"""Name → a changed caption, or None where there is nothing to change."""


def change_captions(name: Perturbation, captions: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """The places (N,) of the captions that have such a change, and their N changed texts."""
    changes = {place: PERTURBATIONS[name](caption) for place, caption in enumerate(captions)}
    changed = {place: text for place, text in changes.items() if text is not None}
    return np.array(list(changed), dtype=np.int64), list(changed.values())


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
