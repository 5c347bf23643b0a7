"""Global batches of several datasets. Each gives its share, in the order of its own epochs, from its own cursor.

A dataset's samples stay within one of its share at every step. Rounding each batch by itself would drift, and giving to
the dataset that lags most would let one lag further when there are many or the weights change. This is the chairman
assignment problem: R. Tijdeman (Discrete Mathematics 32, 1980) proves that k datasets stay within 1 - 1/(2k-2) at any
weights when the one with the earliest deadline gives next (so a dataset may still give one sample after its weight
falls to 0). All arithmetic is in whole numbers, so that every rank and machine deals the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mmflow.core.errors import RecipeError
from mmflow.loading.config import MixtureConfig
from mmflow.loading.epoch import Epochs
from mmflow.loading.permutation import Ints, key_of, shuffled
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

# --- how many samples each dataset gives ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Samples that are dealt by the same shares."""

    first: int  # samples dealt before it
    owed: tuple[int, ...]  # what each dataset should have given by then, in samples times WHOLE
    shares: tuple[int, ...]

    def owed_at(self, dealt: int) -> tuple[int, ...]:
        """What each dataset should have given after `dealt` samples in all, in samples times WHOLE."""
        return tuple(
            before + share * (dealt - self.first) for before, share in zip(self.owed, self.shares, strict=True)
        )


def shares_of(config: MixtureConfig, samples: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The shares of a mixture, by the step from which they hold; `samples` and shares are by dataset, own first.

    Raises RecipeError when a dataset without samples has a weight.
    """
    weights: Sequence[float]
    if config.weighting == "fixed":
        weights = config.weights
    else:
        # Relative to the largest, so that the power at a low temperature cannot overflow.
        exponent = 1.0 if config.weighting == "proportional" else 1 / config.temperature
        weights = [(number / max(1, *samples)) ** exponent for number in samples]
    changes = {0: weights, **{change.step: change.weights for change in config.curriculum}}
    for step, weights in changes.items():
        for number, (weight, size) in enumerate(zip(weights, samples, strict=True)):
            if weight and not size:
                raise RecipeError(
                    f"loader.mixture: dataset {number} (0 is the stage's own) has weight {weight:g} from step {step} "
                    "on, but its split has no samples; name a split that has some, or set the weight to 0"
                )
        if not any(weights):
            raise RecipeError("loader.mixture: no dataset has samples in its split; name splits that have some")
    return {step: to_shares(weights) for step, weights in changes.items()}


def to_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as whole shares of WHOLE. The rounding rest goes to the largest remainders."""
    total = math.fsum(weights)
    exact = [weight / total * WHOLE for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: WHOLE - sum(shares)]:
        shares[number] += 1
    return tuple(shares)


def timeline(shares_by_step: Mapping[int, tuple[int, ...]], global_batch_size: int) -> list[Segment]:
    """The segments of a training whose shares change at these ascending steps, the first of them 0."""
    segments: list[Segment] = []
    for step, shares in shares_by_step.items():
        first = step * global_batch_size
        segments.append(Segment(first, segments[-1].owed_at(first) if segments else (0,) * len(shares), shares))
    return segments


def apportion(
    segments: Sequence[Segment], drawn: Sequence[int], dealt: int, key: str = "loader.mixture"
) -> tuple[int, ...]:
    """What each dataset has given once `dealt` samples are dealt in all; `drawn` is what each gave before.

    Raises RecipeError naming `key` when `drawn` is too far from these weights to come from them.
    """
    owed = next(segment for segment in reversed(segments) if segment.first <= dealt).owed_at(dealt)
    # Tijdeman's bounds, |given - owed| <= 1 - 1/parts, times `parts` to stay in whole numbers.
    parts = max(2, 2 * len(drawn) - 2)
    slack = (parts - 1) * WHOLE
    most = [(parts * due + slack) // (parts * WHOLE) for due in owed]
    least = [-((slack - parts * due) // (parts * WHOLE)) for due in owed]
    given = [max(pair) for pair in zip(least, drawn, strict=True)]
    left = dealt - sum(given)
    may_give = [number for number, count in enumerate(given) if count < most[number]]
    if not 0 <= left <= len(may_give):
        expected = [round(due / WHOLE) for due in owed]
        raise RecipeError(
            f"{key}: the checkpoint drew {list(drawn)}, but these weights give {expected} by now; resume with the "
            "checkpoint's weights and batch size"
        )

    def deadline(number: int) -> float:
        """Samples dealt in all by when this dataset must have given its next one."""
        limit = (parts * (given[number] + 1) - 1) * WHOLE // parts
        for segment, end in zip(segments, [*(later.first for later in segments[1:]), math.inf], strict=True):
            share, before = segment.shares[number], segment.owed[number]
            if share and segment.first + (limit - before) // share < end:
                return segment.first + (limit - before) // share
        return math.inf

    for number in sorted(may_give, key=deadline)[:left]:
        given[number] += 1
    return tuple(given)


# --- which samples they are -------------------------------------------------------------------------------------------


Group = tuple[tuple[int, ...], list[list[Ints]]]
"""Consecutive batches that share out their samples by length, or one batch without buckets: samples of each dataset
dealt before the next group, and by batch, then dataset, its cursors (n,)."""


@dataclass(frozen=True)
class MixtureOrder:
    """The global batches of a mixture, without an end and without padding: a dataset that is drawn more often than its
    size begins its next epoch earlier. `LoaderState.epoch` stays 0, and its position counts the whole training."""

    shard_samples: tuple[tuple[int, ...], ...]  # one per dataset, the stage's own first
    shares: Mapping[int, tuple[int, ...]]  # as `shares_of`
    global_batch_size: int
    seed: int
    window: int = 4_096
    lanes: int = 16
    buckets: Buckets | None = None

    @cached_property
    def num_samples(self) -> tuple[int, ...]:
        """Samples in an epoch of each dataset."""
        return tuple(sum(samples) for samples in self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold as many samples as all datasets together: the unit of `training.epochs`."""
        return num_steps(sum(self.num_samples), self.global_batch_size)

    @cached_property
    def _segments(self) -> list[Segment]:
        return timeline(self.shares, self.global_batch_size)

    @cached_property
    def _epochs(self) -> tuple[Epochs, ...]:
        # Each has its own key, so that two datasets of the same shape have different orders.
        return tuple(
            Epochs(samples, int(key_of(self.seed, number)[0]), self.window, self.lanes)
            for number, samples in enumerate(self.shard_samples)
        )

    def after(self, state: LoaderState) -> LoaderState:
        """Where the batch after the one at `state` begins."""
        (drawn, batches), number = self._group(state)
        if number + 1 < len(batches):
            drawn = self._drawn(state)
        return LoaderState(0, state.position + self.global_batch_size, drawn)

    def batch(self, state: LoaderState) -> Slots:
        """The global batch at `state`, in slot order. Raises RecipeError for a state of other data."""
        datasets, cursors = self._dealt(state)
        epochs = cursors // np.array(self.num_samples)[datasets]
        shards, rows = np.empty_like(cursors), np.empty_like(cursors)
        for dataset, epochs_of in enumerate(self._epochs):
            chosen = datasets == dataset
            shards[chosen], rows[chosen] = epochs_of.locate(cursors[chosen])
        return Slots(datasets, shards, rows, epochs, np.ones(len(cursors), np.bool_))

    def read_ahead(self, state: LoaderState, rank: int = 0, world_size: int = 1) -> list[Read]:
        """What a rank reads at `state` and soon after."""
        datasets, cursors = self._dealt(state)
        taken, _ = rank_indices(len(cursors), rank, world_size)
        return [
            (dataset, *run)
            for dataset, epochs in enumerate(self._epochs)
            for run in epochs.read_ahead(cursors[taken][datasets[taken] == dataset])
        ]

    def _dealt(self, state: LoaderState) -> tuple[Ints, Ints]:
        """The dataset and the cursor of each slot; both (global_batch_size,)."""
        (_, batches), number = self._group(state)
        by_dataset = batches[number]
        datasets = np.repeat(np.arange(len(by_dataset)), [len(cursors) for cursors in by_dataset])
        cursors = np.concatenate(by_dataset)
        # By lane first: a rank then has the same lanes of every dataset, and keeps them when the weights change.
        lanes = cursors % np.array(self.num_samples)[datasets] % self.lanes
        order = np.lexsort((cursors, datasets, lanes))
        return datasets[order], cursors[order]

    def _group(self, state: LoaderState) -> tuple[Group, int]:
        """The group of the batch at `state`, and the batch's number in it."""
        size, first = self.global_batch_size, state.position
        if self.buckets:
            check_aligned(state.position, size)
            first -= state.position % (size * self.buckets.batches)
        drawn = self._drawn(state)
        if state.epoch or len(drawn) != len(self.shard_samples) or sum(drawn) != first:
            raise RecipeError(
                f"loader.mixture: the checkpoint is at {state}, which is not a state of a mixture of "
                f"{len(self.shard_samples)} datasets; resume with the checkpoint's datasets and mixture"
            )
        return self._groups(first, drawn), (state.position - first) // size

    def _drawn(self, state: LoaderState) -> tuple[int, ...]:
        return state.drawn or (0,) * len(self.shard_samples)

    @cached_property
    def _groups(self) -> Callable[[int, tuple[int, ...]], Group]:
        # Two of them: one group is still being loaded when the next one begins.
        return lru_cache(maxsize=2)(self._deal)

    def _deal(self, first: int, drawn: tuple[int, ...]) -> Group:
        """The group after `first` samples, of which each dataset gave `drawn`."""
        num_batches = self.buckets.batches if self.buckets else 1
        ends = [drawn]
        for number in range(1, num_batches + 1):
            ends.append(apportion(self._segments, ends[-1], first + number * self.global_batch_size))
        # (batches, datasets)
        sizes = np.diff(np.array(ends), axis=0)
        ranks = shuffled(num_batches, key_of(self.seed, first))
        # For each dataset, the cursors of each batch. With the same ranks, a batch has the shortest of every dataset.
        columns = []
        for dataset, (start, stop) in enumerate(zip(ends[0], ends[-1], strict=True)):
            cursors = np.arange(start, stop)
            if self.buckets:
                lengths = self.buckets.measure(dataset, *self._epochs[dataset].locate(cursors))
                dealt = deal_by_length(lengths, sizes[:, dataset].tolist(), ranks)
                columns.append([cursors[indices] for indices in dealt])
            else:
                columns.append([cursors])
        return ends[-1], [list(batch) for batch in zip(*columns, strict=True)]
