"""The order of one epoch. The shard and row of any position are computed directly, in memory of the number of shards.

An epoch's line is its permuted shards laid end to end. It is cut into lanes of equal length, and each lane is shuffled
within windows. Position p of the epoch lies in lane p mod `lanes`: consecutive positions are spread over the lanes,
while each lane is read forward, window after window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from mmflow.loading.permutation import Ints, Words, key_of, mix, permute, shuffled

Run = tuple[int, int, int]
"""(shard, first row, last row): rows that are neighbours in a shard and are needed at about the same time."""

# Odd, and far from each other and from the generator's own step, so that no two windows of an epoch share a key.
LANE_STEP = np.uint64(0xD1342543DE82EF95)
WINDOW_STEP = np.uint64(0xAEF17502108EF2D9)


@dataclass(frozen=True)
class Windows:
    """The window of each of n positions; all (n,)."""

    lane: Ints
    number: Ints  # of the window in its lane
    within: Ints  # place of the position in its window
    start: Ints  # first place of the window on the line
    size: Ints


@dataclass(frozen=True)
class EpochPlan:
    """The sample order of one epoch of a dataset's split."""

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
    def _key(self) -> Words:
        return key_of(self.seed, self.epoch)

    @cached_property
    def _shard_order(self) -> Ints:
        # (num_shards,)
        return shuffled(len(self.shard_samples), self._key)

    @cached_property
    def _shard_starts(self) -> Ints:
        # (num_shards + 1,): where each permuted shard begins on the line, and where the last one ends
        sizes = np.asarray(self.shard_samples, dtype=np.int64)[self._shard_order]
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))

    @cached_property
    def _turn(self) -> int:
        # Where the line begins. Without it, the windows of a one-shard split would hold the same rows in every epoch.
        return int(mix(~self._key)[0]) % max(1, self.num_samples)

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """(shard, row) of each position of the epoch; all three arrays are (n,) int64."""
        windows = self._windows(positions)
        keys = self._key + windows.lane.astype(np.uint64) * LANE_STEP + windows.number.astype(np.uint64) * WINDOW_STEP
        places = windows.start + permute(windows.within, windows.size, mix(keys)) + self._turn
        places = np.where(places >= self.num_samples, places - self.num_samples, places)
        # (n,): index among the permuted shards; empty shards share their start with the next one and are passed over
        ordinals = np.searchsorted(self._shard_starts, places, side="right") - 1
        return self._shard_order[ordinals], places - self._shard_starts[ordinals]

    def windows_of(self, positions: Ints) -> list[Run]:
        """All rows of the windows that hold these positions (n,), as disjoint runs, window by window."""
        windows = self._windows(positions)
        _, first = np.unique(windows.start, return_index=True)
        return [run for index in np.sort(first) for run in self._runs(windows.start[index], windows.size[index])]

    def next_windows(self, positions: Ints) -> Ints:
        """The first position of the next window in each position's lane, past the epoch's end if there is none."""
        windows = self._windows(positions)
        return (windows.number + 1) * self.window * self.lanes + windows.lane

    def _windows(self, positions: Ints) -> Windows:
        offsets = positions // self.lanes
        lanes = positions - offsets * self.lanes
        numbers = offsets // self.window
        before = numbers * self.window
        size, num_longer = divmod(self.num_samples, self.lanes)
        return Windows(
            lane=lanes,
            number=numbers,
            within=offsets - before,
            start=lanes * size + np.minimum(lanes, num_longer) + before,
            size=np.minimum(self.window, size + (lanes < num_longer) - before),
        )

    def _runs(self, place: int, size: int) -> Iterator[Run]:
        """The rows of `size` places of the line from `place` on."""
        first = (int(place) + self._turn) % self.num_samples
        stop = first + int(size)
        # The line is a ring: what goes past its end continues at its beginning.
        for begin, end in ((first, min(stop, self.num_samples)), (0, stop - self.num_samples)):
            if begin < end:
                low, high = np.searchsorted(self._shard_starts, (begin, end - 1), side="right").tolist()
                for ordinal in range(low - 1, high):
                    shard, start = int(self._shard_order[ordinal]), int(self._shard_starts[ordinal])
                    num_rows = self.shard_samples[shard]
                    if num_rows:
                        yield shard, max(begin - start, 0), min(end - start, num_rows) - 1


class Epochs:
    """All epochs of a split on one line: cursor c is position c mod `num_samples` of epoch c // `num_samples`."""

    plan: Callable[[int], EpochPlan]

    def __init__(self, shard_samples: tuple[int, ...], seed: int, window: int, lanes: int) -> None:
        self.num_samples, self.lanes = sum(shard_samples), lanes
        # The last two plans are kept: a plan costs a sort of the shards, and epochs overlap at their ends.
        self.plan = lru_cache(maxsize=2)(lambda epoch: EpochPlan(shard_samples, seed, epoch, window, lanes))

    def locate(self, cursors: Ints) -> tuple[Ints, Ints]:
        """(shard, row) of each cursor; all (n,)."""
        shards, rows = np.empty_like(cursors), np.empty_like(cursors)
        for epoch, chosen, positions in self._by_epoch(cursors):
            shards[chosen], rows[chosen] = self.plan(epoch).locate(positions)
        return shards, rows

    def read_ahead(self, cursors: Ints) -> list[Run]:
        """The windows of these cursors (n,), then the next windows of their lanes, even into the next epoch.

        Most of them are those of the batch before, so little is new in each call.
        """
        runs = []
        for epoch, _, positions in self._by_epoch(cursors):
            plan = self.plan(epoch)
            following = plan.next_windows(positions)
            inside = following < self.num_samples
            runs += plan.windows_of(positions) + plan.windows_of(following[inside])
            if not inside.all():
                # The first position of a lane is the lane's number.
                runs += self.plan(epoch + 1).windows_of(following[~inside] % self.lanes)
        return runs

    def _by_epoch(self, cursors: Ints) -> Iterator[tuple[int, NDArray[np.bool_], Ints]]:
        """Each epoch of the cursors (n,), which of them are in it (n,), and their positions in it."""
        if len(cursors):
            epochs, positions = np.divmod(cursors, self.num_samples)
            for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
                chosen = epochs == epoch
                yield epoch, chosen, positions[chosen]
