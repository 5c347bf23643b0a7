"""Global batches as a pure function of (shard sizes, seed, state), so a position is all that a checkpoint saves.

The slots of a batch are sorted by the lanes of their epoch. Ranks take equal slices of them: each rank reads long runs
of few shards, and the batch is the same samples in the same order for every number of ranks. With buckets, a batch
takes varying numbers of samples from each lane, so ranks also read from their neighbours' lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import RecipeError
from mmflow.loading.epoch import Epochs
from mmflow.loading.permutation import Ints, key_of, shuffled

Read = tuple[int, int, int, int]
"""(dataset, shard, first row, last row): rows that are neighbours in a shard and are needed at about the same time."""


@dataclass(frozen=True)
class Slots:
    """Where the samples of a global batch, or of a rank's slice of it, are stored. All (n,)."""

    dataset: Ints
    shard: Ints
    row: Ints
    epoch: Ints  # of the slot's dataset
    real: NDArray[np.bool_]  # False: padding, a sample that counts in another slot

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, index: slice | Ints) -> Slots:
        return Slots(self.dataset[index], self.shard[index], self.row[index], self.epoch[index], self.real[index])


@dataclass(frozen=True)
class LoaderState:
    """Where the next global batch begins: all that a checkpoint keeps of the loader, as JSON through `asdict`."""

    epoch: int = 0
    position: int = 0  # samples dealt over all ranks: in this epoch, or since the start with a mixture or several tasks
    drawn: tuple[int, ...] = ()  # mixture: samples dealt of each dataset when the group of batches began
    tasks: tuple[LoaderState, ...] = ()  # several tasks: the state of each; then `drawn` counts the batches of each

    def __post_init__(self) -> None:
        # JSON gives back lists and dictionaries.
        object.__setattr__(self, "drawn", tuple(self.drawn))
        tasks = (task if isinstance(task, LoaderState) else LoaderState(**task) for task in self.tasks)
        object.__setattr__(self, "tasks", tuple(tasks))


@dataclass(frozen=True)
class Buckets:
    """Groups of batches that share out their samples by length, so that less of each batch is padding."""

    batches: int  # consecutive batches in a group
    lengths: Callable[[int, int, Ints], Ints]  # (dataset, shard, rows (n,)) → (n,), any unit

    def measure(self, dataset: int, shards: Ints, rows: Ints) -> Ints:
        """The lengths of a dataset's samples; all (n,)."""
        lengths = np.empty(len(shards), np.int64)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            lengths[chosen] = self.lengths(dataset, shard, rows[chosen])
        return lengths


def deal_by_length(lengths: Ints, sizes: Sequence[int], ranks: Ints) -> list[Ints]:
    """The samples of each batch of a group, as indices into `lengths` (n,).

    Batch t takes sizes[t] consecutive samples of the sorted lengths; ranks[t] batches take shorter ones. Both have one
    entry per batch, and the sizes sum to n. Samples of equal length keep their order.
    """
    by_length = np.argsort(lengths, kind="stable")
    # (batches,): batch numbers from the shortest samples to the longest, and where each batch's samples end
    batches = np.argsort(ranks)
    ends = np.cumsum(np.asarray(sizes)[batches])
    runs = np.split(by_length, ends[:-1])
    return [runs[rank] for rank in ranks.tolist()]


@dataclass(frozen=True)
class Order:
    """The global batches of one dataset, epoch after epoch. An epoch's last batch is padded with its first samples."""

    shard_samples: tuple[int, ...]
    global_batch_size: int
    seed: int
    window: int = 4_096
    lanes: int = 16
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        if not self.num_samples:
            raise RecipeError(
                f"loader.split: no samples in its {len(self.shard_samples)} shards; name a split that has some"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return sum(self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return num_steps(self.num_samples, self.global_batch_size)

    @cached_property
    def _epochs(self) -> Epochs:
        return Epochs(self.shard_samples, self.seed, self.window, self.lanes)

    def after(self, state: LoaderState) -> LoaderState:
        """Where the batch after the one at `state` begins."""
        position = state.position + self.global_batch_size
        return LoaderState(state.epoch, position) if position < self.num_samples else LoaderState(state.epoch + 1)

    def batch(self, state: LoaderState) -> Slots:
        """The global batch at `state`, in slot order. Raises RecipeError for a state of other data."""
        cursors, real = self._cursors(state)
        shards, rows = self._epochs.locate(cursors)
        zeros = np.zeros_like(cursors)
        return Slots(zeros, shards, rows, zeros + state.epoch, real)

    def read_ahead(self, state: LoaderState, rank: int = 0, world_size: int = 1) -> list[Read]:
        """What a rank reads at `state` and soon after."""
        cursors, _ = self._cursors(state)
        taken, _ = rank_indices(len(cursors), rank, world_size)
        return [(0, *run) for run in self._epochs.read_ahead(cursors[taken])]

    def _cursors(self, state: LoaderState) -> tuple[Ints, NDArray[np.bool_]]:
        """The cursors of the batch in slot order, and which of them are real; both (global_batch_size,)."""
        if state.position >= self.num_samples or state.drawn:
            raise RecipeError(
                f"loader: the checkpoint is at {state}, but an epoch here has {self.num_samples} samples of one "
                "dataset; resume with the dataset and the mixture of the checkpoint"
            )
        stop = state.position + self.global_batch_size
        if self.buckets:
            check_aligned(state.position, self.global_batch_size)
            group, number = divmod(state.position // self.global_batch_size, self.buckets.batches)
            dealt = self._groups(state.epoch, group)[number]
            dealt = dealt[np.lexsort((dealt, dealt % self.lanes))]
        else:
            dealt = by_lane(state.position, min(stop, self.num_samples), self.lanes)
        padding = np.arange(self.num_samples, max(stop, self.num_samples)) % self.num_samples
        real = np.arange(self.global_batch_size) < len(dealt)
        return np.concatenate((dealt, padding)) + state.epoch * self.num_samples, real

    @cached_property
    def _groups(self) -> Callable[[int, int], list[Ints]]:
        # Two of them: one group is still being loaded when the next one begins.
        return lru_cache(maxsize=2)(self._deal)

    def _deal(self, epoch: int, group: int) -> list[Ints]:
        """The positions of each batch of a group of buckets."""
        assert self.buckets is not None
        size = self.global_batch_size
        first = group * self.buckets.batches * size
        positions = np.arange(first, min(first + self.buckets.batches * size, self.num_samples))
        sizes = [min(size, len(positions) - done) for done in range(0, len(positions), size)]
        lengths = self.buckets.measure(0, *self._epochs.locate(positions + epoch * self.num_samples))
        ranks = shuffled(len(sizes), key_of(self.seed, epoch, group))
        return [positions[indices] for indices in deal_by_length(lengths, sizes, ranks)]


def num_steps(num_samples: int, global_batch_size: int) -> int:
    """Steps of an epoch. The last batch is padded, not dropped."""
    return -(-num_samples // global_batch_size)


def by_lane(first: int, stop: int, lanes: int) -> Ints:
    """The positions from `first` to before `stop`, lane by lane; (stop - first,). Sorting would slow every seek."""
    # (rows, lanes): whole turns through the lanes
    turns = np.arange(first // lanes * lanes, -(-stop // lanes) * lanes).reshape(-1, lanes)
    positions = turns.T.ravel()
    return positions[(positions >= first) & (positions < stop)]


def check_aligned(position: int, global_batch_size: int) -> None:
    """Raises RecipeError where no batch begins: a group of buckets cannot be entered within a batch."""
    if position % global_batch_size:
        raise RecipeError(
            f"training.global_batch_size: no batch of {global_batch_size} begins at the checkpoint's position "
            f"{position}; with loader.bucket_batches, resume with the checkpoint's batch size"
        )


def rank_slice(slots: Slots, rank: int, world_size: int) -> Slots:
    """A rank's slots of a global batch, ceil(n / world_size) on every rank; those past the batch are padding."""
    taken, inside = rank_indices(len(slots), rank, world_size)
    own = slots[taken]
    return replace(own, real=own.real & inside)


def rank_indices(num_slots: int, rank: int, world_size: int) -> tuple[Ints, NDArray[np.bool_]]:
    """The slots of a rank, and which of them lie inside the batch; those beyond repeat it from its start."""
    per_rank = -(-num_slots // world_size)
    taken = np.arange(rank * per_rank, (rank + 1) * per_rank)
    return taken % num_slots, taken < num_slots
