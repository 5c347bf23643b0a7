"""Retrieval metrics from similarities: recall at k, mean and median rank (the protocol of COCO and Flickr30k, arXiv
1412.2306, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10)


def ranks_of_right(similarity: NDArray[np.floating]) -> NDArray[np.int64]:
    """The rank, from 1, of candidate i for query i, given similarities (queries, candidates).

    Ties count against the model: one that gives every candidate the same score ranks the right one last, not first.
    A score that is not a number ranks last too.
    """
    right = np.diagonal(similarity)[:, None]
    at_least = ~(similarity < right)  # written so that NaN compares as "at least"
    ranks: NDArray[np.int64] = at_least.sum(axis=1)
    return ranks


def retrieval_metrics(ranks: NDArray[np.int64], recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """{"R@1", …} as shares from 0 to 1, {"mean_rank", "median_rank"} from 1."""
    metrics = {f"R@{k}": float((ranks <= k).mean()) for k in recall_at}
    return metrics | {"mean_rank": float(ranks.mean()), "median_rank": float(np.median(ranks))}


def chance_metrics(candidates: int, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """What guessing gives among so many candidates."""
    metrics = {f"R@{k}": min(1.0, k / candidates) for k in recall_at}
    return metrics | {"mean_rank": (candidates + 1) / 2, "median_rank": (candidates + 1) / 2}
