"""Batches of samples of like length: consecutive batches deal theirs out anew, so that less of each is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Buckets:
    """Which batches share out their samples by length."""

    batches: int  # consecutive batches of a group
    lengths: Callable[[int, int, NDArray[np.int64]], NDArray[np.int64]]  # (dataset, shard, rows (n,)) → (n,), any unit

    def measure(self, dataset: int, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lengths of a dataset's samples, asked for shard by shard; all (n,)."""
        found = np.empty(len(shards), np.int64)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            found[chosen] = self.lengths(dataset, shard, rows[chosen])
        return found


def deal_by_length(
    lengths: NDArray[np.int64], sizes: Sequence[int], ranks: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """The samples of each batch of a group, as indices into `lengths` (n,).

    Batch t takes sizes[t] samples, which lie together when all are sorted by length; ranks[t] says how many batches
    take shorter ones. Both have an entry a batch, and the sizes sum to n. Samples of one length keep their order.
    """
    by_length = np.argsort(lengths, kind="stable")
    # (batches,): from the shortest to the longest, and where each one's samples end
    batches = np.argsort(ranks)
    ends = np.cumsum(np.asarray(sizes)[batches])
    runs = np.split(by_length, ends[:-1])
    return [runs[rank] for rank in ranks.tolist()]
