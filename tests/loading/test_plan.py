"""The order of samples: each one once an epoch, and the same batches for every number of ranks."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmflow.core.errors import RecipeError
from mmflow.loading.epoch import EpochPlan
from mmflow.loading.permutation import key_of, mix
from mmflow.loading.plan import Buckets, LoaderState, Order, Slots, deal_by_length, rank_slice

Sample = tuple[int, int]

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(tuple)
orders = st.builds(
    Order,
    shard_samples=sizes,
    global_batch_size=st.integers(1, 60),  # beyond the samples of many
    seed=st.integers(0, 2**32),
    window=st.integers(1, 60),  # smaller than a lane, and larger than all of them
    lanes=st.integers(1, 20),  # beyond the samples of some
)
worlds = st.integers(1, 9)
epochs = st.integers(0, 9)


def samples(order: Order) -> list[Sample]:
    return [(shard, row) for shard, size in enumerate(order.shard_samples) for row in range(size)]


def real(slots: Slots) -> list[Sample]:
    """(shard, row) of the slots that are no padding."""
    return list(zip(slots.shard[slots.real].tolist(), slots.row[slots.real].tolist(), strict=True))


def states(order: Order, state: LoaderState, steps: int) -> Iterator[LoaderState]:
    for _ in range(steps):
        yield state
        state = order.after(state)


def epoch_of(order: Order, epoch: int = 0) -> list[Slots]:
    return [order.batch(state) for state in states(order, LoaderState(epoch), order.steps_per_epoch)]


def dealt(order: Order, epoch: int = 0) -> list[Sample]:
    return [sample for batch in epoch_of(order, epoch) for sample in real(batch)]


def lengths(dataset: int, shard: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Caption lengths like those of corpora, most short and a few long: 2 to 65, logarithms uniform."""
    words = mix(rows.astype(np.uint64) + key_of(dataset, shard))
    uniform = (words >> np.uint64(11)).astype(np.float64) / 2**53
    return (12 * np.exp(1.7 * (2 * uniform - 1))).astype(np.int64)


def stored(state: LoaderState) -> LoaderState:
    """The state as a checkpoint gives it back."""
    return LoaderState(**json.loads(json.dumps(asdict(state))))


# --- an epoch ---------------------------------------------------------------------------------------------------------


buckets = st.none() | st.builds(Buckets, st.integers(2, 6), st.just(lengths))


@given(order=orders, buckets=buckets, epoch=epochs)
def test_every_sample_comes_once_an_epoch_and_only_the_last_batch_is_padded(
    order: Order, buckets: Buckets | None, epoch: int
) -> None:
    batches = epoch_of(replace(order, buckets=buckets), epoch)
    assert sorted(sample for batch in batches for sample in real(batch)) == samples(order)
    assert all(len(batch) == order.global_batch_size for batch in batches)
    assert all(batch.real.all() for batch in batches[:-1])
    assert (batches[-1].epoch == epoch).all()
    assert not batches[-1].dataset.any()


@given(order=orders, epoch=epochs, data=st.data())
def test_a_batch_may_begin_at_any_position(order: Order, epoch: int, data: st.DataObject) -> None:
    """A training that continues with another batch size neither repeats nor loses samples."""
    stop = data.draw(st.integers(0, len(samples(order)) - 1))
    before = replace(order, global_batch_size=max(1, stop)).batch(LoaderState(epoch))
    seen = real(before)[: stop or -len(before)]
    state = LoaderState(epoch, stop)
    while state.epoch == epoch:
        seen += real(order.batch(state))
        state = order.after(state)
    assert sorted(seen) == samples(order)
    assert state == LoaderState(epoch + 1)


@pytest.mark.parametrize(("num_samples", "batch", "steps"), [(10, 5, 2), (11, 5, 3), (9, 5, 2), (1, 5, 1)])
def test_the_last_batch_is_padded_not_dropped(num_samples: int, batch: int, steps: int) -> None:
    order = Order(shard_samples=(num_samples,), global_batch_size=batch, seed=1)
    assert order.steps_per_epoch == steps
    positions = [LoaderState(2, step * batch) for step in range(steps)]
    assert list(states(order, LoaderState(2), steps + 1)) == [*positions, LoaderState(3)]


def test_padding_repeats_the_first_samples_of_the_epoch() -> None:
    order = Order(shard_samples=(3, 4), global_batch_size=5, seed=1, window=3, lanes=2)
    plan = EpochPlan((3, 4), 1, 0, 3, 2)
    last = order.batch(LoaderState(0, 5))
    assert last.real.tolist() == [True, True, False, False, False]
    shards, rows = plan.locate(np.array([6, 5, 0, 1, 2]))  # lane 0 has the even positions
    assert (last.shard.tolist(), last.row.tolist()) == (shards.tolist(), rows.tolist())


# --- ranks ------------------------------------------------------------------------------------------------------------


@given(order=orders, world_size=worlds, epoch=epochs)
def test_global_batches_are_the_same_for_every_world_size(order: Order, world_size: int, epoch: int) -> None:
    for state in states(order, LoaderState(epoch), order.steps_per_epoch):
        whole = order.batch(state)
        ranks = [rank_slice(order.batch(state), rank, world_size) for rank in range(world_size)]
        assert [len(rank) for rank in ranks] == [-(-order.global_batch_size // world_size)] * world_size
        assert [sample for rank in ranks for sample in real(rank)] == real(whole)
        for name in ("dataset", "shard", "row", "epoch"):
            together = np.concatenate([getattr(rank, name) for rank in ranks])
            assert (together[: len(whole)] == getattr(whole, name)).all(), name


@given(order=orders, worlds=st.tuples(worlds, worlds, worlds), data=st.data())
def test_stopping_and_resuming_on_other_world_sizes_repeats_and_loses_nothing(
    order: Order, worlds: tuple[int, int, int], data: st.DataObject
) -> None:
    straight = epoch_of(order) + epoch_of(order, 1)
    stops = sorted(data.draw(st.integers(0, len(straight))) for _ in range(2))
    state, seen = LoaderState(), []
    for world_size, steps in zip(worlds, np.diff([0, *stops, len(straight)]).tolist(), strict=True):
        resumed = replace(order)  # a new process: nothing is kept but the state
        state = stored(state)
        for reached in states(resumed, state, steps):
            batch = resumed.batch(reached)
            seen.append([sample for rank in range(world_size) for sample in real(rank_slice(batch, rank, world_size))])
            state = resumed.after(reached)
    assert seen == [real(batch) for batch in straight]
    assert Counter(sample for batch in seen for sample in batch) == Counter(2 * samples(order))
    assert state == LoaderState(2)


def test_more_ranks_than_slots_get_padding_of_their_own() -> None:
    order = Order(shard_samples=(2,), global_batch_size=3, seed=4)
    ranks = [rank_slice(order.batch(LoaderState()), rank, 5) for rank in range(5)]
    assert [rank.real.tolist() for rank in ranks] == [[True], [True], [False], [False], [False]]
    assert all(0 <= int(rank.row[0]) < 2 for rank in ranks)


# --- locality ---------------------------------------------------------------------------------------------------------


@given(
    per_rank=st.integers(1, 3),
    per_lane=st.integers(1, 3),
    world_size=st.integers(1, 6),
    sizes=sizes,
    seed=st.integers(0, 99),
    window=st.integers(1, 30),
)
def test_a_rank_reads_the_windows_of_its_own_lanes_alone(
    per_rank: int, per_lane: int, world_size: int, sizes: tuple[int, ...], seed: int, window: int
) -> None:
    lanes = per_rank * world_size
    order = Order(shard_samples=sizes, global_batch_size=lanes * per_lane, seed=seed, window=window, lanes=lanes)
    plan = EpochPlan(sizes, seed, 0, window, lanes)
    positions = np.arange(plan.num_samples)
    for state in states(order, LoaderState(), order.steps_per_epoch):
        batch = order.batch(state)
        if not batch.real.all():
            break  # the last batch is shorter, and its slots are shared out anew
        within = positions[state.position : state.position + order.global_batch_size]
        for rank in range(world_size):
            own = within % lanes // per_rank == rank
            allowed = rows(plan.windows_of(within[own]))
            assert set(real(rank_slice(batch, rank, world_size))) <= allowed


@given(order=orders, epoch=epochs, world_size=worlds, data=st.data())
def test_read_ahead_covers_the_batches_of_a_window(
    order: Order, epoch: int, world_size: int, data: st.DataObject
) -> None:
    """From one call until a window later, the rows that the rank's lanes give are among those asked for."""
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    state = LoaderState(epoch, step * order.global_batch_size)
    asked = set()
    for rank in range(world_size):
        reads = order.read_ahead(state, rank, world_size)
        assert all(
            dataset == 0 and 0 <= first <= last < order.shard_samples[shard] for dataset, shard, first, last in reads
        )
        ahead = rows([read[1:] for read in reads])
        assert set(real(rank_slice(order.batch(state), rank, world_size))) <= ahead
        asked |= ahead
    if order.global_batch_size >= order.lanes:
        ends = state.position + order.window * order.lanes
        for reached in states(order, state, order.steps_per_epoch - step):
            if reached.position + order.global_batch_size <= ends:
                assert set(real(order.batch(reached))) <= asked


def test_the_end_of_an_epoch_reads_ahead_into_the_next() -> None:
    order = Order(shard_samples=(50,) * 8, global_batch_size=20, seed=1, window=10, lanes=4)
    asked = rows([read[1:] for read in order.read_ahead(LoaderState(3, 380))])
    assert set(real(order.batch(LoaderState(3, 380)))) <= asked
    assert set(real(order.batch(LoaderState(4)))) <= asked


def rows(runs: Sequence[tuple[int, int, int]]) -> set[Sample]:
    """The rows of runs, which overlap nowhere within one window."""
    return {(shard, row) for shard, first, last in runs for row in range(first, last + 1)}


# --- the shuffle ------------------------------------------------------------------------------------------------------


def test_order_follows_seed_and_epoch_alone() -> None:
    order = Order(shard_samples=(30, 40, 50), global_batch_size=8, seed=7, window=64, lanes=4)
    first = dealt(order)
    assert dealt(replace(order)) == first
    assert dealt(order, 1) != first
    assert dealt(replace(order, seed=8)) != first
    assert first != sorted(first)


def test_neighbours_of_a_shard_do_not_stay_together() -> None:
    """Neighbouring rows come from one source; batches must separate them as a random order would."""
    order = Order(shard_samples=(4_096,), global_batch_size=64, seed=7, window=256, lanes=4)
    batches = [np.sort(batch.row) for batch in epoch_of(order)]
    # Of 64 samples 16 come from each lane's window of 256: a given row's follower is there for 15 of 255.
    together = sum(int((np.diff(rows) == 1).sum()) for rows in batches)
    assert abs(together / 4_096 - 15 / 255) < 0.02


def test_a_split_of_one_shard_has_other_samples_in_its_windows_each_epoch() -> None:
    order = Order(shard_samples=(1_000,), global_batch_size=100, seed=3, window=50, lanes=2)
    first = {epoch: frozenset(real(order.batch(LoaderState(epoch)))) for epoch in range(6)}
    assert len(set(first.values())) == 6


def test_order_is_a_fixed_function_that_no_release_may_change() -> None:
    """A checkpoint holds only (epoch, position): another order after an upgrade would repeat and lose samples."""
    order = Order(shard_samples=(3, 2, 4), global_batch_size=4, seed=7, window=2, lanes=2)
    assert [real(batch) for batch in epoch_of(order, 1)] == [
        [(0, 1), (0, 2), (2, 1), (2, 2)],
        [(1, 1), (1, 0), (0, 0), (2, 3)],
        [(2, 0)],
    ]


# --- what it costs, and what it refuses -------------------------------------------------------------------------------


def test_a_billion_samples_plan_in_the_memory_of_their_shards() -> None:
    num_shards, per_shard = 100_000, 10_000
    tracemalloc.start()
    try:
        order = Order(shard_samples=(per_shard,) * num_shards, global_batch_size=1_024, seed=7)
        batch = order.batch(LoaderState(3, 123_456_789))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert order.num_samples == 10**9
    assert len(set(real(batch))) == 1_024
    assert batch.shard.max() < num_shards
    assert batch.row.max() < per_shard
    assert peak < 100 * num_shards  # bytes; one array of a byte a sample would take a hundred times as much


@pytest.mark.parametrize("shard_samples", [(), (0,), (0, 0, 0)])
def test_a_split_without_samples_is_refused_by_its_key(shard_samples: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match=rf"^loader\.split: no samples in its {len(shard_samples)} shards"):
        Order(shard_samples=shard_samples, global_batch_size=4, seed=1)


@pytest.mark.parametrize("state", [LoaderState(0, 20), LoaderState(0, 4, (3, 1))])
def test_a_state_of_other_data_is_refused(state: LoaderState) -> None:
    order = Order(shard_samples=(20,), global_batch_size=4, seed=1)
    with pytest.raises(RecipeError, match="resume with the dataset and the mixture of the checkpoint"):
        order.batch(state)


# --- one epoch --------------------------------------------------------------------------------------------------------


@given(order=orders, epoch=epochs, data=st.data())
def test_a_position_is_located_without_the_positions_before_it(order: Order, epoch: int, data: st.DataObject) -> None:
    plan = EpochPlan(order.shard_samples, order.seed, epoch, order.window, order.lanes)
    places = np.stack(plan.locate(np.arange(plan.num_samples)))
    positions = data.draw(st.lists(st.integers(0, plan.num_samples - 1), min_size=1, max_size=20))
    assert np.array_equal(np.stack(plan.locate(np.array(positions))), places[:, positions])


def test_windows_and_lanes_of_an_epoch_are_shuffled_each_in_its_own_way() -> None:
    plan = EpochPlan((4_000,), 7, 0, 100, 4)
    _, rows = plan.locate(np.arange(4_000))
    # (window, place, lane) to (window and lane, place)
    places = rows.reshape(10, 100, 4).transpose(0, 2, 1).reshape(40, 100)
    ranks = np.argsort(np.argsort(places, axis=1), axis=1)
    assert len({tuple(row) for row in ranks.tolist()}) == 40
    correlations = np.corrcoef(ranks)[~np.eye(40, dtype=bool)]
    assert np.abs(correlations).max() < 0.5  # 1/sqrt(100) is one standard deviation


def test_shards_are_read_in_another_order_each_epoch() -> None:
    plans = [EpochPlan((10,) * 50, 3, epoch, 1, 1) for epoch in range(4)]
    lines = [tuple(plan.locate(np.arange(0, 500))[0].tolist()) for plan in plans]
    assert len({tuple(dict.fromkeys(line)) for line in lines}) == 4


# --- buckets ----------------------------------------------------------------------------------------------------------


def waste(batches: Sequence[Slots]) -> float:
    """The share of tokens that is padding to the longest text of its batch."""
    kept = padded = 0
    for batch in batches:
        places = zip(*(column[batch.real].tolist() for column in (batch.dataset, batch.shard, batch.row)), strict=True)
        counts = [int(lengths(dataset, shard, np.array([row]))[0]) for dataset, shard, row in places]
        kept, padded = kept + sum(counts), padded + max(counts) * len(counts)
    return 1 - kept / padded


@given(order=orders, num_batches=st.integers(2, 6), data=st.data())
def test_a_batch_is_rebuilt_without_the_others_of_its_group(
    order: Order, num_batches: int, data: st.DataObject
) -> None:
    order = replace(order, buckets=Buckets(num_batches, lengths))
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    state = LoaderState(0, step * order.global_batch_size)
    assert real(replace(order).batch(state)) == real(epoch_of(order)[step])


@given(order=orders, num_batches=st.integers(2, 6))
def test_a_group_holds_the_samples_that_it_had_without_buckets(order: Order, num_batches: int) -> None:
    plain, bucketed = epoch_of(order), epoch_of(replace(order, buckets=Buckets(num_batches, lengths)))
    for first in range(0, len(plain), num_batches):
        groups = [
            sorted(sample for batch in batches[first : first + num_batches] for sample in real(batch))
            for batches in (plain, bucketed)
        ]
        assert groups[0] == groups[1]


def test_buckets_cut_the_waste_of_padding_to_less_than_a_third() -> None:
    order = Order(shard_samples=(500,) * 4, global_batch_size=32, seed=3)
    plain = waste(epoch_of(order))
    assert plain > 0.5
    assert waste(epoch_of(replace(order, buckets=Buckets(16, lengths)))) < plain / 3


def test_batches_of_a_group_come_in_no_order_of_length() -> None:
    """If the short ones came first, the loss would rise and fall with every group."""
    order = Order(shard_samples=(2_000,), global_batch_size=10, seed=3, buckets=Buckets(20, lengths))
    means = np.array([np.mean([lengths(0, 0, np.array([row]))[0] for _, row in real(b)]) for b in epoch_of(order)])
    ranks = np.argsort(np.argsort(means.reshape(10, 20), axis=1), axis=1)
    assert abs(np.corrcoef(ranks.ravel(), np.tile(np.arange(20), 10))[0, 1]) < 0.3
    assert len({tuple(group) for group in ranks.tolist()}) == 10


def test_deal_by_length_gives_each_batch_a_run_of_the_sorted_lengths() -> None:
    batches = deal_by_length(np.array([5, 1, 4, 1, 3]), [2, 2, 1], np.array([2, 0, 1]))
    assert [indices.tolist() for indices in batches] == [[2, 0], [1, 3], [4]]


def test_a_position_within_a_batch_is_refused() -> None:
    order = Order(shard_samples=(100,), global_batch_size=8, seed=3, buckets=Buckets(4, lengths))
    with pytest.raises(RecipeError, match=r"^training\.global_batch_size: no batch of 8 begins at .* position 12;"):
        order.batch(LoaderState(0, 12))
