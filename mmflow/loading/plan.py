"""Global batches as a pure function of (shard sizes, seed, state), so that a position is all there is to save.

The slots of a batch go by the lanes of their epoch. Ranks take equal slices of them, so that each rank reads a few long
runs of a few shards, and the batch is the same set in the same order for every number of ranks. Buckets loosen the
first, never the second: what a batch takes of a lane then varies, and ranks reach into their neighbours' lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import RecipeError
from mmflow.loading.epoch import Epochs, Latest
from mmflow.loading.permutation import key_of, shuffled


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


Read = tuple[int, int, int, int]
"""(dataset, shard, first row, last row): rows that lie together and are wanted at about the same time."""


@dataclass(frozen=True)
class Slots:
    """A global batch, or a rank's slice of one: where its samples lie. All (n,)."""

    dataset: NDArray[np.int64]
    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    epoch: NDArray[np.int64]  # of the slot's dataset
    real: NDArray[np.bool_]  # False: padding, a sample that counts in another slot

    def __len__(self) -> int:
        return len(self.real)


@dataclass(frozen=True)
class LoaderState:
    """Where the next global batch begins: all that a checkpoint keeps of the loader, as JSON through `asdict`."""

    epoch: int = 0
    position: int = 0  # samples dealt over all ranks: in this epoch, or in the whole training where there is a mixture
    drawn: tuple[int, ...] = ()  # of a mixture: samples dealt of each dataset, when the group of batches began
    tasks: tuple[LoaderState, ...] = ()  # where each of several stands; then `drawn` are the batches that each has had

    def __post_init__(self) -> None:
        # JSON gives back lists and dictionaries.
        object.__setattr__(self, "drawn", tuple(self.drawn))
        tasks = (each if isinstance(each, LoaderState) else LoaderState(**each) for each in self.tasks)
        object.__setattr__(self, "tasks", tuple(tasks))


@dataclass(frozen=True)
class Order:
    """The global batches of one dataset, epoch after epoch; the last of an epoch is padded with its first samples."""

    shard_samples: tuple[int, ...]
    global_batch_size: int
    seed: int
    window: int = 4_096
    lanes: int = 16
    buckets: Buckets | None = None
    _epochs: Epochs = field(init=False, repr=False, compare=False)
    _groups: Latest[tuple[int, int], list[NDArray[np.int64]]] = field(
        default_factory=Latest, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.num_samples:
            raise RecipeError(
                f"loader.split: no samples in its {len(self.shard_samples)} shards; name a split that has some"
            )
        object.__setattr__(self, "_epochs", Epochs(self.shard_samples, self.seed, self.window, self.lanes))

    @cached_property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return sum(self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; the last is padded, not dropped."""
        return num_steps(self.num_samples, self.global_batch_size)

    def step_of(self, state: LoaderState) -> int:
        """Batches that have been dealt when `state` is reached."""
        return state.epoch * self.steps_per_epoch + state.position // self.global_batch_size

    def after(self, state: LoaderState) -> LoaderState:
        """Where the batch after that of `state` begins."""
        position = state.position + self.global_batch_size
        return LoaderState(state.epoch, position) if position < self.num_samples else LoaderState(state.epoch + 1)

    def batch(self, state: LoaderState) -> Slots:
        """The whole global batch that begins at `state`, in slot order. RecipeError where it is of other data."""
        positions, real = self._positions(state)
        shards, rows = self._epochs.plan(state.epoch).locate(positions)
        zeros = np.zeros_like(positions)
        return Slots(zeros, shards, rows, zeros + state.epoch, real)

    def read_ahead(self, state: LoaderState, rank: int = 0, world_size: int = 1) -> list[Read]:
        """The rows of the windows that a rank reads from at `state`, then of those that follow in their lanes.

        A batch has most of them in common with the one before: only what is new needs to be asked for.
        """
        positions, _ = self._positions(state)
        taken, _ = rank_indices(len(positions), rank, world_size)
        return [(0, *run) for run in self._epochs.read_ahead(state.epoch, positions[taken])]

    def _positions(self, state: LoaderState) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions of the epoch in slot order, and which of them are real; both (global_batch_size,)."""
        if state.position >= self.num_samples or state.drawn:
            raise RecipeError(
                f"loader: the checkpoint stands at {state}, an epoch here has {self.num_samples} samples of one "
                "dataset; resume with the dataset and the mixture that it was trained with"
            )
        stop = state.position + self.global_batch_size
        if self.buckets:
            dealt = self._bucketed(self.buckets, state)
            dealt = dealt[np.lexsort((dealt, dealt % self.lanes))]
        else:
            dealt = by_lane(state.position, min(stop, self.num_samples), self.lanes)
        padding = np.arange(self.num_samples, max(stop, self.num_samples)) % self.num_samples
        real = np.arange(self.global_batch_size) < len(dealt)
        return np.concatenate((dealt, padding)), real

    def _bucketed(self, buckets: Buckets, state: LoaderState) -> NDArray[np.int64]:
        """Positions of the batch among those of its group; (n,)."""
        size = self.global_batch_size
        check_aligned(state.position, size)
        step = state.position // size
        group, number = divmod(step, buckets.batches)

        def deal() -> list[NDArray[np.int64]]:
            first = group * buckets.batches * size
            positions = np.arange(first, min(first + buckets.batches * size, self.num_samples))
            sizes = [min(size, len(positions) - done) for done in range(0, len(positions), size)]
            lengths = buckets.measure(0, *self._epochs.plan(state.epoch).locate(positions))
            ranks = shuffled(len(sizes), key_of(self.seed, state.epoch, group))
            return [positions[indices] for indices in deal_by_length(lengths, sizes, ranks)]

        return self._groups.get((state.epoch, group), deal)[number]


def num_steps(num_samples: int, global_batch_size: int) -> int:
    """Steps of an epoch: the last batch is padded, not dropped."""
    return -(-num_samples // global_batch_size)


def by_lane(first: int, stop: int, lanes: int) -> NDArray[np.int64]:
    """The positions from `first` to before `stop`, lane by lane; (stop - first,). No sort: a seek would feel it."""
    # (rows, lanes): whole turns of the lanes
    turns = np.arange(first // lanes * lanes, -(-stop // lanes) * lanes).reshape(-1, lanes)
    positions = turns.T.ravel()
    return positions[(positions >= first) & (positions < stop)]


def check_aligned(position: int, global_batch_size: int) -> None:
    """Raises RecipeError where no batch begins: a group of buckets cannot be entered in the midst of a batch."""
    if position % global_batch_size:
        raise RecipeError(
            f"training.global_batch_size: no batch of {global_batch_size} begins at the checkpoint's position "
            f"{position}; with loader.bucket_batches resume with the batch size that it was trained with"
        )


def rank_slice(slots: Slots, rank: int, world_size: int) -> Slots:
    """A rank's slots of a global batch, ceil(n / world_size) on every rank; those past the batch are padding."""
    taken, inside = rank_indices(len(slots), rank, world_size)
    return Slots(
        dataset=slots.dataset[taken],
        shard=slots.shard[taken],
        row=slots.row[taken],
        epoch=slots.epoch[taken],
        real=slots.real[taken] & inside,
    )


def rank_indices(num_slots: int, rank: int, world_size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The slots that a rank takes, and which of them lie inside the batch; those beyond repeat it from its start."""
    per_rank = -(-num_slots // world_size)
    taken = np.arange(rank * per_rank, (rank + 1) * per_rank)
    return taken % num_slots, taken < num_slots
