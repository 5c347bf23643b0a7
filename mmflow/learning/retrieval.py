"""Retrieval metrics from similarities, with one right answer or several: recall at k, mean and median rank, mean
average precision. The protocol is that of COCO and Flickr30k (arXiv 1412.2306, section 4): an image has found its
captions as soon as one of them comes up.

Ties count against the model: one that gives every candidate the same score ranks the right one last, not first. So does
a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10)
BLOCK = 1024  # queries compared at a time: 25,000 captions with 5,000 images at once would be 125 MB

# Shapes: Q queries, C candidates.


@dataclass(frozen=True)
class QueryRanks:
    """Where each query's right candidates came, (Q,) both."""

    ranks: NDArray[np.int64]  # of the best right candidate, from 1
    precision: NDArray[np.float64]  # average precision over the right candidates


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


def rank_one(similarity_QC: NDArray[np.floating], right_Q: NDArray[np.integer] | None = None) -> QueryRanks:
    """For queries with one right candidate each, such as a caption and its image."""
    ranks = ranks_of_right(similarity_QC, right_Q)
    return QueryRanks(ranks, 1 / ranks)


def rank_several(similarity_QC: NDArray[np.floating], query_of_C: NDArray[np.integer]) -> QueryRanks:
    """For queries with several right candidates, such as an image and its captions: candidate c is right for
    `query_of_C[c]`, and every query has at least one.

    Right candidates do not push each other back. A wrong candidate that ties with a right one comes before it.
    """
    order = np.argsort(query_of_C, kind="stable")
    bounds = np.searchsorted(query_of_C[order], np.arange(len(similarity_QC) + 1))
    before_C = np.zeros(len(query_of_C), dtype=np.int64)
    for query, scores_C in enumerate(similarity_QC):
        own = order[bounds[query] : bounds[query + 1]]
        wrong = np.sort(np.delete(scores_C, own))  # NaN comes last
        below = np.searchsorted(wrong, scores_C[own], side="left")
        below[np.isnan(scores_C[own])] = 0
        before_C[own] = len(wrong) - below
    return ranks_of_several(before_C, query_of_C)


def ranks_of_several(before_C: NDArray[np.integer], query_of_C: NDArray[np.integer]) -> QueryRanks:
    """From the number of wrong candidates that come before each right one, where candidate c is right for
    `query_of_C[c]`, and every query has at least one."""
    order_C = np.lexsort((before_C, query_of_C))
    before_C = before_C[order_C]
    counts_Q = np.bincount(query_of_C)
    starts_Q = np.cumsum(counts_Q) - counts_Q
    number_C = np.arange(1, len(before_C) + 1) - np.repeat(starts_Q, counts_Q)  # from 1, of a query's right ones
    precision_Q = np.add.reduceat(number_C / (number_C + before_C), starts_Q) / counts_Q
    return QueryRanks(1 + before_C[starts_Q], precision_Q)


def retrieval_metrics(queries: QueryRanks, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """{"R@1", …, "mAP"} as shares from 0 to 1, {"mean_rank", "median_rank"} from 1."""
    return {f"R@{k}": float((queries.ranks <= k).mean()) for k in recall_at} | {
        "mAP": float(queries.precision.mean()),
        "mean_rank": float(queries.ranks.mean()),
        "median_rank": float(np.median(queries.ranks)),
    }


def chance_metrics(
    num_candidates: int, right: Sequence[int] | NDArray[np.integer] = (1,), recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """The expected metrics of guessing, where `right` is the number of right candidates of each query."""
    counts, queries = np.unique(np.asarray(right), return_counts=True)
    weights = queries / queries.sum()
    later = [_chance_of_later(num_candidates, int(count)) for count in counts]
    reached = 1 - sum(weight * chances for weight, chances in zip(weights, later, strict=True))
    assert isinstance(reached, np.ndarray)
    harmonic = (1 / np.arange(1, num_candidates + 1)).sum()
    # E[AP] = (H + (m-1)/(N-1) (N-H)) / N: a place holds a right candidate with m/N, each place before it with
    # (m-1)/(N-1).
    spread = (counts - 1) / max(1, num_candidates - 1)
    precision = (harmonic + spread * (num_candidates - harmonic)) / num_candidates
    # The median: the middle of the ranks with at least half of the queries on either side.
    median = (np.argmax(reached >= 0.5 - 1e-9) + np.argmax(reached > 0.5 + 1e-9)) / 2
    return {f"R@{k}": float(reached[min(k, num_candidates)]) for k in recall_at} | {
        "mAP": float((weights * precision).sum()),
        "mean_rank": float((weights * (num_candidates + 1) / (counts + 1)).sum()),
        "median_rank": float(median),
    }


def _chance_of_later(num_candidates: int, num_right: int) -> NDArray[np.float64]:
    """The probability that the best right candidate comes after place r, for r from 0 to `num_candidates`."""
    free = num_candidates - np.arange(num_candidates + 1)
    later = np.ones(num_candidates + 1)
    for placed in range(num_right):
        later *= np.clip((free - placed) / (num_candidates - placed), 0, None)
    return later
