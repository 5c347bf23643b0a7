"""Global batches of several datasets: each gives its share, from a cursor of its own that runs through its own epochs.

A mixture has no end and no padding: a dataset that is drawn more often than its size begins its next epoch earlier. The
state holds one number a dataset, so that resume costs the same at any step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import RecipeError
from mmflow.loading.config import MixtureConfig
from mmflow.loading.epoch import Epochs, Latest
from mmflow.loading.permutation import key_of, shuffled
from mmflow.loading.plan import (
    Buckets,
    LoaderState,
    Read,
    Slots,
    check_aligned,
    deal_by_length,
    num_steps,
    rank_indices,
)

WHOLE = 2**40
"""The sum of the shares. A share is exact to 1e-12: after 10^11 samples a dataset is off by a tenth of one."""


@dataclass(frozen=True)
class Stage:
    """Shares that hold from a step on, to the next stage's."""

    step: int
    shares: tuple[int, ...]  # one a dataset, of WHOLE


@dataclass(frozen=True)
class Segment:
    """A stage on the line of samples."""

    first: int  # samples dealt before it
    owed: tuple[int, ...]  # what each dataset should have given by then, in samples times WHOLE
    shares: tuple[int, ...]


def stages(config: MixtureConfig, samples: Sequence[int]) -> tuple[Stage, ...]:
    """The weights of a mixture step by step; `samples` has one number a dataset, the stage's own first.

    Weights change at once at the step that the curriculum names, never gradually: what a batch holds can be read off
    the recipe. Raises RecipeError where weight is put on a dataset without samples.
    """
    weights: Sequence[float]
    if config.weighting == "fixed":
        weights = config.weights
    else:
        # Of the largest, lest a low temperature's power should overflow.
        exponent = 1.0 if config.weighting == "proportional" else 1 / config.temperature
        weights = [(number / max(1, *samples)) ** exponent for number in samples]
    changes = {0: weights, **{change.step: change.weights for change in config.curriculum}}
    for step, each in changes.items():
        for number, (weight, size) in enumerate(zip(each, samples, strict=True)):
            if weight and not size:
                raise RecipeError(
                    f"loader.mixture: weight {weight:g} from step {step} on for dataset {number} (0 is the stage's "
                    "own), whose split has no samples; name a split that has some, or weigh it 0"
                )
        if not any(each):
            raise RecipeError("loader.mixture: no dataset of it has samples in its split; name splits that have some")
    return tuple(Stage(step, to_shares(each)) for step, each in changes.items())


def to_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as whole shares of WHOLE, what is left over going to the largest remainders."""
    total = math.fsum(weights)
    exact = [weight / total * WHOLE for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: WHOLE - sum(shares)]:
        shares[number] += 1
    return tuple(shares)


def timeline(stages: Sequence[Stage], global_batch_size: int) -> tuple[Segment, ...]:
    """The stages on the line of samples, with what is owed at the start of each."""
    segments = [Segment(0, (0,) * len(stages[0].shares), stages[0].shares)]
    for stage in stages[1:]:
        first = stage.step * global_batch_size
        segments.append(Segment(first, _owed(segments[-1], first), stage.shares))
    return tuple(segments)


def apportion(
    segments: Sequence[Segment], drawn: Sequence[int], dealt: int, key: str = "loader.mixture"
) -> tuple[int, ...]:
    """What each dataset has given when `dealt` samples are dealt in all, `drawn` being what each gave until now.

    Raises RecipeError naming `key` where `drawn` is not of these weights: it lies too far from what they ask.
    """
    owed = _owed(next(segment for segment in reversed(segments) if segment.first <= dealt), dealt)
    # Both bounds of what a dataset may have given, |given - owed| <= 1 - 1/parts, times parts to stay whole numbers.
    parts = max(2, 2 * len(drawn) - 2)
    slack = (parts - 1) * WHOLE
    most = [(parts * each + slack) // (parts * WHOLE) for each in owed]
    least = [-((slack - parts * each) // (parts * WHOLE)) for each in owed]
    given = [max(each, before) for each, before in zip(least, drawn, strict=True)]
    left = dealt - sum(given)
    may_give = [number for number, each in enumerate(given) if each < most[number]]
    if not 0 <= left <= len(may_give):
        asked = [round(each / WHOLE) for each in owed]
        raise RecipeError(
            f"{key}: the checkpoint drew {list(drawn)} of each, these weights ask for {asked} by now; resume with the "
            "weights and the batch size that it was trained with"
        )

    def latest(number: int) -> float:
        """Samples dealt in all when the next of this dataset must have been given."""
        limit = (parts * (given[number] + 1) - 1) * WHOLE // parts
        for segment, end in zip(segments, [*(each.first for each in segments[1:]), math.inf], strict=True):
            share, before = segment.shares[number], segment.owed[number]
            if share and segment.first + (limit - before) // share < end:
                return segment.first + (limit - before) // share
        return math.inf

    for number in sorted(may_give, key=latest)[:left]:
        given[number] += 1
    return tuple(given)


def _owed(segment: Segment, dealt: int) -> tuple[int, ...]:
    return tuple(
        before + share * (dealt - segment.first) for before, share in zip(segment.owed, segment.shares, strict=True)
    )


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
