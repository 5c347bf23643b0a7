"""The nearest candidates of each query, exactly, from candidates that come in blocks. The first of equals comes first,
and NaN last."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmflow.learning.tiles import Blocks, Buffer, Embeddings, similarity_tile

# Shapes: Q queries, C candidates of a block, R queries that a block changes, K nearest, W the width of the embeddings.


class Nearest:
    """The `count` highest scores of each query so far. Scores come in blocks, in the order of the candidates."""

    def __init__(self, num_queries: int, count: int, device: torch.device) -> None:
        self._count, self._num_candidates = count, 0
        # Negated scores: sorted upwards, NaN comes last.
        self._distances_QK = torch.empty(num_queries, 0, device=device)
        self._places_QK = torch.empty(num_queries, 0, dtype=torch.int64, device=device)

    @property
    def places_QK(self) -> Tensor:
        """(Q, K) int64: the numbers of the candidates, from 0 over all blocks, the best first. K is `count`, or the
        number of candidates if there are fewer."""
        return self._places_QK

    @property
    def scores_QK(self) -> Tensor:
        """(Q, K) float32: their scores."""
        return 0 - self._distances_QK

    def add(self, scores_QC: Tensor) -> None:
        """Take the scores of the next block of candidates."""
        first, num_new = self._num_candidates, scores_QC.shape[1]
        self._num_candidates += num_new
        if num_new == 0 or self._count == 0:
            return
        if first < self._count:
            self._distances_QK, self._places_QK = self._merged(slice(None), scores_QC, first)
            return
        # Candidates no better than the last one kept change nothing, and after some blocks most rows have no better.
        changed_R = (~(scores_QC.amax(1) <= 0 - self._distances_QK[:, -1])).nonzero()[:, 0]
        if len(changed_R):
            merged = self._merged(changed_R, scores_QC[changed_R], first)
            self._distances_QK[changed_R], self._places_QK[changed_R] = merged

    def _merged(self, rows_R: Tensor | slice, scores_RC: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Distances and places (R, K) of these queries after a block that begins with candidate `first`."""
        distances_RC = 0 - scores_RC  # not -scores: GPUs select by bits, which tell 0 from -0
        new_RK = _least(distances_RC, self._count)
        distances_RK = torch.cat([self._distances_QK[rows_R], distances_RC.gather(1, new_RK)], dim=1)
        places_RK = torch.cat([self._places_QK[rows_R], new_RK + first], dim=1)
        # Places ascend among equals, and a stable sort keeps them so.
        distances_RK, order_RK = distances_RK.sort(dim=1, stable=True)
        return distances_RK[:, : self._count], places_RK.gather(1, order_RK[:, : self._count])


def _least(distances_RC: Tensor, count: int) -> Tensor:
    """(R, K) ascending places of the `count` least of each row; the first of equals, NaN only where there are too few
    others."""
    num_candidates = distances_RC.shape[1]
    if count >= num_candidates:
        return torch.arange(num_candidates, device=distances_RC.device).expand_as(distances_RC)
    # One more than needed: if the next is as near as the last, then which of the equals are chosen is not defined.
    values, places = distances_RC.topk(count + 1, dim=1, largest=False)
    last, beyond = values[:, count - 1], values[:, count]
    places = places[:, :count]
    unclear = ((last == beyond) | last.isnan()).nonzero()[:, 0]
    if len(unclear):
        places[unclear] = distances_RC[unclear].sort(dim=1, stable=True).indices[:, :count]
    return places.sort(dim=1).values


@torch.no_grad()
def nearest_in_tiles(
    queries_QW: Embeddings,
    blocks: Iterable[Embeddings],
    count: int,
    *,
    tile: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Places and scores (Q, K) of the candidates with the greatest scalar products, the best first.

    Candidates come in blocks (C, W) of any sizes, such as those of a file; places are numbered on over all of them. K
    is `count`, or the number of candidates if there are fewer. Memory holds the queries, one block, a tile and the
    result. The device is that of the queries by default.
    """
    queries = Blocks(queries_QW, tile=tile, device=device)
    buffer = Buffer(queries.device)
    nearest = [Nearest(end - start, count, queries.device) for start, end in queries.bounds]
    for block_CW in blocks:
        candidates = Blocks(block_CW, tile=tile, device=queries.device)
        for number, (start, end) in enumerate(candidates.bounds):
            candidates_CW = candidates[number]
            for rows, (first, last) in enumerate(queries.bounds):
                scores_TC = similarity_tile(queries[rows], candidates_CW, buffer)
                nearest[rows].add(scores_TC[: last - first, : end - start])
    places_QK = torch.cat([block.places_QK for block in nearest])
    scores_QK = torch.cat([block.scores_QK for block in nearest])
    return places_QK.cpu().numpy(), scores_QK.cpu().numpy()
