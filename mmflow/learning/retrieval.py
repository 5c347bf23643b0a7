"""Retrieval metrics from similarities, with one right answer or several: recall at k, mean and median rank, mean
average precision (the protocol of COCO and Flickr30k, arXiv 1412.2306, section 4: a picture has found its captions as
soon as one of them comes up).

Ties count against the model: one that gives every candidate the same score ranks the right one last, not first. A score
that is not a number ranks last too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10)
BLOCK = 1024  # queries compared at a time: a comparison of 25,000 captions with 5,000 pictures at once is 125 MB

# Shapes: Q queries, C candidates.


@dataclass(frozen=True)
class Found:
    """How each query did: both (Q,)."""

    ranks: NDArray[np.int64]  # from 1, of the best right candidate
    precision: NDArray[np.float64]  # average precision over its right candidates


def ranks_of_right(
    similarity_QC: NDArray[np.floating], right_Q: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """The rank, from 1, of each query's one right candidate: `right_Q`, or candidate i for query i."""
    queries = np.arange(len(similarity_QC))
    right_Q = queries if right_Q is None else right_Q
    ranks = np.zeros(len(queries), dtype=np.int64)
    for rows in np.split(queries, range(BLOCK, len(queries), BLOCK)):
        block = similarity_QC[rows]
        right = block[np.arange(len(rows)), right_Q[rows]][:, None]
        ranks[rows] = (~(block < right)).sum(axis=1)  # written so that NaN compares as "at least"
    return ranks


def find_one(similarity_QC: NDArray[np.floating], right_Q: NDArray[np.integer] | None = None) -> Found:
    """Queries with one right candidate each: a caption and its picture."""
    ranks = ranks_of_right(similarity_QC, right_Q)
    return Found(ranks, 1 / ranks)


def find_any(similarity_QC: NDArray[np.floating], query_of_C: NDArray[np.integer]) -> Found:
    """Queries with several right candidates: a picture and its captions, candidate c being right for `query_of_C[c]`.

    Every query needs one at least. Right candidates do not stand in each other's way; a wrong one that ties with a
    right one stands before it.
    """
    order = np.argsort(query_of_C, kind="stable")
    bounds = np.searchsorted(query_of_C[order], np.arange(len(similarity_QC) + 1))
    ranks = np.zeros(len(similarity_QC), dtype=np.int64)
    precision = np.zeros(len(similarity_QC))
    for query, scores_C in enumerate(similarity_QC):
        own = order[bounds[query] : bounds[query + 1]]
        wrong = np.sort(np.delete(scores_C, own))  # NaN comes last
        below = np.searchsorted(wrong, scores_C[own], side="left")
        below[np.isnan(scores_C[own])] = 0
        before = np.sort(len(wrong) - below)  # wrong candidates that stand before each right one, the best first
        place = np.arange(1, len(own) + 1)
        ranks[query] = 1 + before[0]
        precision[query] = (place / (place + before)).mean()
    return Found(ranks, precision)


def nearest(similarity_QC: NDArray[np.floating], count: int, axis: int) -> NDArray[np.bool_]:
    """(Q, C): True for the `count` greatest along an axis: 1 for each query's candidates, 0 for each candidate's
    queries. The first of equals come first."""
    chosen_QC = np.zeros(similarity_QC.shape, dtype=np.bool_)
    kept = range(min(count, similarity_QC.shape[axis]))
    places = np.argsort(-similarity_QC, axis=axis, kind="stable").take(kept, axis=axis)
    np.put_along_axis(chosen_QC, places, True, axis=axis)
    return chosen_QC


def reordered(
    similarity_QC: NDArray[np.floating], scores_QC: NDArray[np.floating], chosen_QC: NDArray[np.bool_]
) -> NDArray[np.floating]:
    """`similarity_QC` with the scores in the place of those that are `chosen_QC`, lifted above all others: the chosen
    come first, in the order of their scores, then the others in that of their similarity."""
    found_QC = similarity_QC.copy()
    scores = scores_QC[chosen_QC]
    if len(scores):
        lift = np.fmax.reduce(similarity_QC, axis=None) + 1 - np.fmin.reduce(scores)
        found_QC[chosen_QC] = scores + lift  # a NaN stays one, which ranks last
    return found_QC


def retrieval_metrics(found: Found, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """{"R@1", …, "mAP"} as shares from 0 to 1, {"mean_rank", "median_rank"} from 1."""
    metrics = {f"R@{k}": float((found.ranks <= k).mean()) for k in recall_at}
    return metrics | {
        "mAP": float(found.precision.mean()),
        "mean_rank": float(found.ranks.mean()),
        "median_rank": float(np.median(found.ranks)),
    }


def chance_metrics(
    candidates: int, right: Sequence[int] | NDArray[np.integer] = (1,), recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """What guessing gives among so many candidates, `right` of them right for each query (one number a query)."""
    counts, queries = np.unique(np.asarray(right), return_counts=True)
    weights = queries / queries.sum()
    later = sum(weight * _later(candidates, int(count)) for count, weight in zip(counts, weights, strict=True))
    assert isinstance(later, np.ndarray)
    harmonic = (1 / np.arange(1, candidates + 1)).sum()
    # E[AP] = (H + (m-1)/(N-1) (N-H)) / N: a place holds a right one with m/N, and each before it with (m-1)/(N-1).
    spread = (counts - 1) / max(1, candidates - 1)
    precision = (harmonic + spread * (candidates - harmonic)) / candidates
    # The median of the ranks: the middle of those that half the queries do not come after, and not before.
    reached = 1 - later
    median = (np.argmax(reached >= 0.5 - 1e-9) + np.argmax(reached > 0.5 + 1e-9)) / 2
    return {f"R@{k}": float(reached[min(k, candidates)]) for k in recall_at} | {
        "mAP": float((weights * precision).sum()),
        "mean_rank": float((weights * (candidates + 1) / (counts + 1)).sum()),
        "median_rank": float(median),
    }


def _later(candidates: int, right: int) -> NDArray[np.float64]:
    """The probability that the best of `right` right ones comes after place r, for r from 0 to `candidates`."""
    later = np.ones(candidates + 1)
    for one in range(right):
        later *= np.clip((candidates - np.arange(candidates + 1) - one) / (candidates - one), 0, None)
    return later
