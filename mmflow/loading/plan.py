"""The order of an epoch as a pure function of (shard sizes, seed, epoch), so that a position is all there is to save.

Shards are permuted and laid end to end; each window of that line is permuted in turn; global batch t is the samples at
positions [t·B, (t+1)·B). Ranks take equal slices of a batch, so the batch is the same set in the same order for every
number of ranks, and any rank can seek to any position at the cost of one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EpochPlan:
    """The sample order of one epoch. Memory grows with the number of shards, never of samples."""

    shard_samples: tuple[int, ...]
    seed: int
    epoch: int
    window: int = 16_384

    @cached_property
    def num_samples(self) -> int:
        """Samples in the epoch."""
        return sum(self.shard_samples)

    @cached_property
    def _shard_sizes(self) -> NDArray[np.int64]:
        # (num_shards,)
        return np.asarray(self.shard_samples, dtype=np.int64)

    @cached_property
    def _shard_order(self) -> NDArray[np.int64]:
        # (num_shards,)
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.shard_samples))

    @cached_property
    def _shard_ends(self) -> NDArray[np.int64]:
        # (num_shards,): where each permuted shard ends on the line
        return np.cumsum(self._shard_sizes[self._shard_order])

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row) of each position of the epoch; all three arrays are (n,) int64."""
        # (n,): the place on the line of permuted shards
        places = np.empty_like(positions)
        windows = positions // self.window
        for window in np.unique(windows):
            within = windows == window
            order = _window_order(self.seed, self.epoch, int(window), self._window_size(int(window)))
            places[within] = window * self.window + order[positions[within] - window * self.window]
        # (n,): index among the permuted shards
        ordinals = np.searchsorted(self._shard_ends, places, side="right")
        shards = self._shard_order[ordinals]
        starts = self._shard_ends[ordinals] - self._shard_sizes[shards]
        return shards, places - starts

    def _window_size(self, window: int) -> int:
        return min(self.window, self.num_samples - window * self.window)


@lru_cache(maxsize=4)
def _window_order(seed: int, epoch: int, window: int, size: int) -> NDArray[np.int64]:
    # (size,)
    return np.random.default_rng((seed, epoch, window, 1)).permutation(size)


def num_steps(num_samples: int, global_batch_size: int) -> int:
    """Steps of an epoch: the last batch is padded, not dropped."""
    return -(-num_samples // global_batch_size)


def rank_slots(global_batch_size: int, rank: int, world_size: int) -> range:
    """The slots of a global batch that a rank takes. Every rank takes as many; slots past the batch are padding."""
    per_rank = -(-global_batch_size // world_size)
    return range(rank * per_rank, (rank + 1) * per_rank)


def batch_positions(
    num_samples: int, global_batch_size: int, step: int, slots: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Positions of an epoch's batch `step` for some of its slots, and which of them are real: both (len(slots),).

    Padding repeats samples of the same epoch rather than zeros, so that batch statistics stay those of pictures.
    """
    slot = np.asarray(slots, dtype=np.int64)
    position = step * global_batch_size + slot
    real = (slot < global_batch_size) & (position < num_samples)
    return np.where(real, position, position % num_samples), real
