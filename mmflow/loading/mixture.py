"""Global batches of several datasets: each gives its share, from a cursor of its own that runs through its own epochs.

A mixture has no end and no padding: a dataset that is drawn more often than its size begins its next epoch earlier. The
state holds one number a dataset, so that resume costs the same at any step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import RecipeError
from mmflow.loading.apportion import Segment, Stage, apportion, timeline
from mmflow.loading.bucketing import Buckets, deal_by_length
from mmflow.loading.epoch import Epochs, Latest
from mmflow.loading.permutation import key_of, shuffled
from mmflow.loading.plan import LoaderState, Read, Slots, check_aligned, num_steps, rank_indices


@dataclass(frozen=True)
class Group:
    """Consecutive batches that share out their samples by length; one batch where there are no buckets."""

    drawn: tuple[int, ...]  # when the next group begins
    cursors: list[list[NDArray[np.int64]]]  # of each batch and dataset: (n,), samples of it dealt before this one


@dataclass(frozen=True)
class MixtureOrder:
    """The global batches of a mixture, whose step is that of the whole training; `LoaderState.epoch` stays 0."""

    shard_samples: tuple[tuple[int, ...], ...]  # a dataset each, the stage's own first
    stages: tuple[Stage, ...]
    global_batch_size: int
    seed: int
    window: int = 4_096
    lanes: int = 16
    buckets: Buckets | None = None
    _groups: Latest[LoaderState, Group] = field(default_factory=Latest, init=False, repr=False, compare=False)

    @cached_property
    def num_samples(self) -> tuple[int, ...]:
        """Samples in an epoch of each dataset."""
        return tuple(sum(samples) for samples in self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold as many samples as all datasets together: the measure of `training.epochs`."""
        return num_steps(sum(self.num_samples), self.global_batch_size)

    @cached_property
    def _segments(self) -> tuple[Segment, ...]:
        return timeline(self.stages, self.global_batch_size)

    @cached_property
    def _epochs(self) -> tuple[Epochs, ...]:
        # A key of its own for each, lest two datasets of the same shape should be dealt in step.
        return tuple(
            Epochs(samples, int(key_of(self.seed, number)[0]), self.window, self.lanes)
            for number, samples in enumerate(self.shard_samples)
        )

    def step_of(self, state: LoaderState) -> int:
        """Batches that have been dealt when `state` is reached."""
        return state.position // self.global_batch_size

    def after(self, state: LoaderState) -> LoaderState:
        """Where the batch after that of `state` begins."""
        group, number = self._group(state)
        drawn = group.drawn if number + 1 == len(group.cursors) else self._drawn(state)
        return LoaderState(0, state.position + self.global_batch_size, drawn)

    def batch(self, state: LoaderState) -> Slots:
        """The whole global batch that begins at `state`, in slot order. RecipeError where it is of other data."""
        datasets, cursors = self._dealt(state)
        epochs = cursors // np.array(self.num_samples)[datasets]
        shards, rows = np.empty_like(cursors), np.empty_like(cursors)
        for dataset in np.unique(datasets).tolist():
            chosen = datasets == dataset
            shards[chosen], rows[chosen] = self._locate(dataset, cursors[chosen])
        return Slots(datasets, shards, rows, epochs, np.ones(len(cursors), np.bool_))

    def read_ahead(self, state: LoaderState, rank: int = 0, world_size: int = 1) -> list[Read]:
        """The rows of the windows that a rank reads from at `state`, then of those that follow in their lanes.

        A batch has most of them in common with the one before: only what is new needs to be asked for.
        """
        datasets, cursors = self._dealt(state)
        taken, _ = rank_indices(len(cursors), rank, world_size)
        datasets, cursors = datasets[taken], cursors[taken]
        reads: list[Read] = []
        for dataset in np.unique(datasets).tolist():
            epochs, positions = np.divmod(cursors[datasets == dataset], self.num_samples[dataset])
            for epoch in np.unique(epochs).tolist():
                runs = self._epochs[dataset].read_ahead(epoch, positions[epochs == epoch])
                reads += [(dataset, *run) for run in runs]
        return reads

    def _dealt(self, state: LoaderState) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The dataset and the cursor of each slot; both (global_batch_size,)."""
        group, number = self._group(state)
        taken = group.cursors[number]
        datasets = np.repeat(np.arange(len(taken)), [len(each) for each in taken])
        cursors = np.concatenate(taken)
        # By lane first: a rank then has the same lanes of every dataset, and keeps them when the weights change.
        lanes = cursors % np.array(self.num_samples)[datasets] % self.lanes
        order = np.lexsort((cursors, datasets, lanes))
        return datasets[order], cursors[order]

    def _group(self, state: LoaderState) -> tuple[Group, int]:
        """The group of the batch that begins at `state`, and the batch's number in it."""
        size, first = self.global_batch_size, state.position
        if self.buckets:
            check_aligned(state.position, size)
            first -= state.position % (size * self.buckets.batches)
        drawn = self._drawn(state)
        if state.epoch or len(drawn) != len(self.shard_samples) or sum(drawn) != first:
            raise RecipeError(
                f"loader.mixture: the checkpoint stands at {state}, which is no state of a mixture of "
                f"{len(self.shard_samples)} datasets; resume with the datasets and the mixture that it was trained with"
            )
        start = LoaderState(0, first, drawn)
        return self._groups.get(start, lambda: self._deal(start)), (state.position - first) // size

    def _drawn(self, state: LoaderState) -> tuple[int, ...]:
        return state.drawn or (0,) * len(self.shard_samples)

    def _deal(self, start: LoaderState) -> Group:
        num_batches = self.buckets.batches if self.buckets else 1
        ends = [start.drawn]
        for number in range(1, num_batches + 1):
            ends.append(apportion(self._segments, ends[-1], start.position + number * self.global_batch_size))
        # (batches, datasets)
        sizes = np.diff(np.array(ends), axis=0)
        ranks = shuffled(num_batches, key_of(self.seed, start.position))
        # For each dataset, the cursors of each batch: all have their shortest in the same one.
        columns = []
        for dataset, (first, stop) in enumerate(zip(ends[0], ends[-1], strict=True)):
            cursors = np.arange(first, stop)
            if self.buckets:
                lengths = self.buckets.measure(dataset, *self._locate(dataset, cursors))
                columns.append([cursors[each] for each in deal_by_length(lengths, sizes[:, dataset].tolist(), ranks)])
            else:
                columns.append([cursors])
        return Group(ends[-1], [list(batch) for batch in zip(*columns, strict=True)])

    def _locate(self, dataset: int, cursors: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row) of a dataset's cursors, whatever their epochs; all (n,)."""
        shards, rows = np.empty_like(cursors), np.empty_like(cursors)
        if len(cursors):
            epochs, positions = np.divmod(cursors, self.num_samples[dataset])
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                shards[chosen], rows[chosen] = self._epochs[dataset].plan(epoch).locate(positions[chosen])
        return shards, rows
