"""Mixtures: each dataset's every sample once in each of its own epochs, in the same batches whoever takes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import RecipeError
from mmflow.loading.mixture import MixtureOrder, to_shares
from mmflow.loading.plan import Buckets, LoaderState, Slots, rank_slice
from tests.loading.test_bucketing import lengths

Sample = tuple[int, int, int, int]  # dataset, epoch, shard, row


@st.composite
def mixtures(draw: st.DrawFn) -> MixtureOrder:
    sizes = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any).map(tuple)
    shard_samples = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    weights = st.lists(st.integers(0, 5), min_size=len(shard_samples), max_size=len(shard_samples)).filter(any)
    steps = [0, *sorted(draw(st.sets(st.integers(1, 8), max_size=2)))]
    return MixtureOrder(
        shard_samples=shard_samples,
        shares={step: to_shares(draw(weights)) for step in steps},
        global_batch_size=draw(st.integers(1, 30)),  # a small dataset may be dealt several times in a batch
        seed=draw(st.integers(0, 2**32)),
        window=draw(st.integers(1, 30)),
        lanes=draw(st.integers(1, 8)),
        buckets=draw(st.one_of(st.none(), st.builds(Buckets, st.integers(1, 5), st.just(lengths)))),
    )


def real(slots: Slots) -> list[Sample]:
    columns = (slots.dataset, slots.epoch, slots.shard, slots.row)
    return list(zip(*(column[slots.real].tolist() for column in columns), strict=True))


def states(order: MixtureOrder, state: LoaderState, steps: int) -> Iterator[LoaderState]:
    for _ in range(steps):
        yield state
        state = order.after(state)


def batches(order: MixtureOrder, steps: int) -> list[Slots]:
    return [order.batch(state) for state in states(order, LoaderState(), steps)]


def stored(state: LoaderState) -> LoaderState:
    """The state as a checkpoint gives it back."""
    return LoaderState(**json.loads(json.dumps(asdict(state))))


@given(order=mixtures(), steps=st.integers(1, 10))
def test_each_dataset_gives_every_sample_once_in_each_of_its_own_epochs(order: MixtureOrder, steps: int) -> None:
    group = order.buckets.batches if order.buckets else 1
    found = batches(order, -(-steps // group) * group)  # buckets deal whole groups
    assert all(batch.real.all() and len(batch) == order.global_batch_size for batch in found)
    counts = Counter(sample for batch in found for sample in real(batch))
    assert set(counts.values()) == {1}
    for dataset, shard_samples in enumerate(order.shard_samples):
        every = {(shard, row) for shard, size in enumerate(shard_samples) for row in range(size)}
        drawn = [(epoch, shard, row) for of, epoch, shard, row in counts if of == dataset]
        epochs, left = divmod(len(drawn), len(every))
        for epoch in range(epochs + 1):
            seen = {(shard, row) for of, shard, row in drawn if of == epoch}
            assert seen == every if epoch < epochs else len(seen) == left


@given(order=mixtures(), worlds=st.tuples(*[st.integers(1, 7)] * 3), steps=st.integers(1, 10), data=st.data())
def test_stopping_and_resuming_on_other_world_sizes_gives_the_batches_of_a_straight_run(
    order: MixtureOrder, worlds: tuple[int, int, int], steps: int, data: st.DataObject
) -> None:
    stops = sorted(data.draw(st.integers(0, steps)) for _ in range(2))
    state, found = LoaderState(), []
    for world_size, run in zip(worlds, np.diff([0, *stops, steps]).tolist(), strict=True):
        resumed = replace(order)
        state = stored(state)
        for reached in states(resumed, state, run):
            ranks = [rank_slice(resumed.batch(reached), rank, world_size) for rank in range(world_size)]
            assert len({len(rank) for rank in ranks}) == 1
            found.append([sample for rank in ranks for sample in real(rank)])
            state = resumed.after(reached)
    assert found == [real(batch) for batch in batches(order, steps)]
    assert order.step_of(state) == steps


@given(order=mixtures(), steps=st.integers(1, 10))
def test_batches_hold_the_weights_to_within_a_sample_at_every_step(order: MixtureOrder, steps: int) -> None:
    asked, given = np.zeros(len(order.shard_samples)), np.zeros(len(order.shard_samples))
    for step, batch in enumerate(batches(order, steps)):
        shares = order.shares[max(first for first in order.shares if first <= step)]
        asked += order.global_batch_size * np.array(shares) / sum(shares)
        given += np.bincount(batch.dataset, minlength=len(given))
        assert (np.abs(given - asked) < 1).all()


def test_a_state_holds_one_number_a_dataset_however_long_the_training() -> None:
    order = MixtureOrder(shard_samples=((40,), (10, 10)), shares={0: to_shares([3, 1])}, global_batch_size=8, seed=1)
    *_, state = states(order, LoaderState(), 1_001)
    assert state == LoaderState(0, 8_000, (6_000, 2_000))
    assert order.step_of(state) == 1_000
    assert Counter(batch := order.batch(state).dataset.tolist()) == {0: 6, 1: 2}, batch


def test_steps_of_an_epoch_count_the_samples_of_all_datasets() -> None:
    order = MixtureOrder(shard_samples=((40,), (10, 11)), shares={0: to_shares([1, 1])}, global_batch_size=8, seed=1)
    assert order.steps_per_epoch == 8


def test_ranks_keep_their_lanes_of_every_dataset_when_the_weights_change() -> None:
    """Each node reads its share of the shards of each dataset, before and after."""
    order = MixtureOrder(
        shard_samples=((50,) * 32, (50,) * 32),
        shares={0: to_shares([1, 1]), 60: to_shares([1, 3])},
        global_batch_size=32,
        seed=1,
        window=20,
        lanes=8,
    )
    seen: list[set[tuple[int, int]]] = [set() for _ in range(4)]
    for batch in batches(order, 80):  # within the first epoch of both
        for rank in range(4):
            own = rank_slice(batch, rank, 4)
            seen[rank] |= set(zip(own.dataset.tolist(), own.shard.tolist(), strict=True))
    assert {of for shards in seen for of, _ in shards} == {0, 1}
    # A quarter of 64 shards, and one cut at each end of the four stretches of two lanes of two datasets.
    assert all(len(shards) <= 16 + 8 for shards in seen)


@given(order=mixtures(), step=st.integers(0, 6), world_size=st.integers(1, 5))
def test_what_is_read_ahead_covers_the_batch_and_lies_within_the_shards(
    order: MixtureOrder, step: int, world_size: int
) -> None:
    *_, state = states(order, LoaderState(), step + 1)
    for rank in range(world_size):
        asked = set()
        for dataset, shard, first, last in order.read_ahead(state, rank, world_size):
            assert 0 <= first <= last < order.shard_samples[dataset][shard]
            asked |= {(dataset, shard, row) for row in range(first, last + 1)}
        own = real(rank_slice(order.batch(state), rank, world_size))
        assert {(dataset, shard, row) for dataset, _, shard, row in own} <= asked


def test_datasets_of_one_shape_are_not_dealt_in_step() -> None:
    order = MixtureOrder(shard_samples=((60,), (60,)), shares={0: to_shares([1, 1])}, global_batch_size=10, seed=1)
    rows = [[row for batch in batches(order, 12) for of, _, _, row in real(batch) if of == each] for each in (0, 1)]
    assert sorted(rows[0]) == sorted(rows[1])
    assert rows[0] != rows[1]


def test_buckets_give_every_dataset_its_shortest_samples_in_the_same_batch() -> None:
    plain = MixtureOrder(shard_samples=((400,), (400,)), shares={0: to_shares([1, 1])}, global_batch_size=16, seed=1)

    def waste(order: MixtureOrder) -> float:
        kept = padded = 0
        for batch in batches(order, 48):
            found = [int(lengths(of, shard, np.array([row]))[0]) for of, _, shard, row in real(batch)]
            kept, padded = kept + sum(found), padded + max(found) * len(found)
        return 1 - kept / padded

    assert waste(replace(plain, buckets=Buckets(8, lengths))) < waste(plain) / 2


@pytest.mark.parametrize(
    "state",
    [
        LoaderState(0, 16),
        LoaderState(1),
        LoaderState(0, 16, (16,)),
        LoaderState(0, 16, (8, 9)),
        LoaderState(0, 8, (4, 5)),
    ],
)
def test_a_state_of_another_mixture_is_refused(state: LoaderState) -> None:
    order = MixtureOrder(shard_samples=((40,), (10, 11)), shares={0: to_shares([1, 1])}, global_batch_size=8, seed=1)
    with pytest.raises(RecipeError, match="not a state of a mixture of 2 datasets"):
        order.batch(state)


def test_a_dataset_that_weighs_nothing_is_never_read() -> None:
    order = MixtureOrder(shard_samples=((40,), (0,)), shares={0: to_shares([1, 0])}, global_batch_size=8, seed=1)
    assert all(not batch.dataset.any() for batch in batches(order, 12))
