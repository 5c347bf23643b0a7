"""The order of one epoch: any position's shard and row, found without walking to it, in the memory of the shards.

An epoch's line is its shards, permuted and laid end to end. It is cut into lanes of equal length, each shuffled inside
windows. Position p of the epoch lies in lane p mod `lanes`, so that positions that follow each other are spread over
the lanes, while each lane is read on and on, window after window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmflow.loading.permutation import key_of, mix, permute, shuffled

Key = TypeVar("Key")
Value = TypeVar("Value")
Run = tuple[int, int, int]
"""(shard, first row, last row): rows that lie together and are wanted at about the same time."""

# Odd and far from each other and from the generator's own step, so that no two windows of an epoch share a key.
LANE_STEP = np.uint64(0xD1342543DE82EF95)
WINDOW_STEP = np.uint64(0xAEF17502108EF2D9)


class Latest(Generic[Key, Value]):
    """The last two results of a pure function: one epoch is still being prepared when the next has begun.

    Threads may race for it; the worst is that one of them computes again. It travels to other processes.
    """

    def __init__(self) -> None:
        self._pairs: tuple[tuple[Key, Value], ...] = ()

    def get(self, key: Key, compute: Callable[[], Value]) -> Value:
        for known, value in self._pairs:
            if known == key:
                return value
        value = compute()
        self._pairs = (*self._pairs[-1:], (key, value))
        return value


@dataclass(frozen=True)
class Windows:
    """The window of each of n positions; all (n,)."""

    lane: NDArray[np.int64]
    number: NDArray[np.int64]  # of the window in its lane
    within: NDArray[np.int64]  # where in the window the position is
    start: NDArray[np.int64]  # the window's first place on the line
    size: NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """The sample order of one epoch of a dataset's split. Memory grows with the number of shards, never of samples."""

    shard_samples: tuple[int, ...]
    seed: int
    epoch: int
    window: int = 4_096
    lanes: int = 16

    @cached_property
    def num_samples(self) -> int:
        """Samples in the epoch."""
        return sum(self.shard_samples)

    @cached_property
    def _key(self) -> NDArray[np.uint64]:
        return key_of(self.seed, self.epoch)

    @cached_property
    def _shard_order(self) -> NDArray[np.int64]:
        # (num_shards,)
        return shuffled(len(self.shard_samples), self._key)

    @cached_property
    def _shard_starts(self) -> NDArray[np.int64]:
        # (num_shards + 1,): where each permuted shard begins on the line, and where the last one ends
        sizes = np.asarray(self.shard_samples, dtype=np.int64)[self._shard_order]
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))

    @cached_property
    def _turn(self) -> int:
        # Where the line begins. Without it, the windows of a split of one shard would hold the same rows every epoch.
        return int(mix(~self._key)[0]) % max(1, self.num_samples)

    def lane_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lane of each position; (n,) to (n,)."""
        return positions % self.lanes

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row) of each position of the epoch; all three arrays are (n,) int64."""
        found = self._windows(positions)
        keys = self._key + found.lane.astype(np.uint64) * LANE_STEP + found.number.astype(np.uint64) * WINDOW_STEP
        places = found.start + permute(found.within, found.size, mix(keys)) + self._turn
        places = np.where(places >= self.num_samples, places - self.num_samples, places)
        # (n,): index among the permuted shards; of those that begin at one place, all but the last are empty
        ordinals = np.searchsorted(self._shard_starts, places, side="right") - 1
        return self._shard_order[ordinals], places - self._shard_starts[ordinals]

    def windows_of(self, positions: NDArray[np.int64]) -> list[Run]:
        """All rows of the windows that these positions (n,) lie in, as disjoint runs, window by window."""
        found = self._windows(positions)
        _, first = np.unique(found.start, return_index=True)
        return [run for index in np.sort(first) for run in self._runs(int(found.start[index]), int(found.size[index]))]

    def next_windows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first position of the window that follows each position's in its lane, past the end where none does."""
        found = self._windows(positions)
        return (found.number + 1) * self.window * self.lanes + found.lane

    def _windows(self, positions: NDArray[np.int64]) -> Windows:
        offsets = positions // self.lanes
        lanes = positions - offsets * self.lanes
        numbers = offsets // self.window
        before = numbers * self.window
        size, longer = divmod(self.num_samples, self.lanes)
        starts = lanes * size + np.minimum(lanes, longer) + before
        return Windows(
            lane=lanes,
            number=numbers,
            within=offsets - before,
            start=starts,
            size=np.minimum(self.window, size + (lanes < longer) - before),
        )

    def _runs(self, place: int, size: int) -> Iterator[Run]:
        """The rows under `size` places from `place` on."""
        first = (place + self._turn) % self.num_samples
        stop = first + size
        # The line is a ring: what goes past its end goes on at its beginning.
        for begin, end in ((first, min(stop, self.num_samples)), (0, stop - self.num_samples)):
            if begin < end:
                low, high = np.searchsorted(self._shard_starts, (begin, end - 1), side="right").tolist()
                for ordinal in range(low - 1, high):
                    shard, start = int(self._shard_order[ordinal]), int(self._shard_starts[ordinal])
                    samples = self.shard_samples[shard]
                    if samples:
                        yield shard, max(begin - start, 0), min(end - start, samples) - 1


@dataclass(frozen=True)
class Epochs:
    """The plans of a split's epochs, the last of them kept: a plan costs a sort of the shards."""

    shard_samples: tuple[int, ...]
    seed: int
    window: int
    lanes: int
    _plans: Latest[int, EpochPlan] = field(default_factory=Latest, init=False, repr=False, compare=False)

    def plan(self, epoch: int) -> EpochPlan:
        return self._plans.get(epoch, lambda: EpochPlan(self.shard_samples, self.seed, epoch, self.window, self.lanes))

    def read_ahead(self, epoch: int, positions: NDArray[np.int64]) -> list[Run]:
        """The windows that these positions (n,) lie in, then the next of their lanes, be they of the next epoch."""
        plan = self.plan(epoch)
        following = plan.next_windows(positions)
        inside = following < plan.num_samples
        runs = plan.windows_of(positions) + plan.windows_of(following[inside])
        if not inside.all():
            # A lane's number is the first position in it.
            runs += self.plan(epoch + 1).windows_of(following[~inside] % self.lanes)
        return runs
