"""The order of an epoch: every sample once, the same for every number of ranks, found without walking to it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.loading.plan import EpochPlan, batch_positions, num_steps, rank_slots

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(tuple)
seeds = st.integers(0, 2**32)
windows = st.integers(1, 600)  # smaller than a shard, and larger than all of them
batches = st.integers(1, 50)
worlds = st.integers(1, 9)


def order(plan: EpochPlan) -> list[tuple[int, int]]:
    """(shard, row) of every position of the epoch."""
    shards, rows = plan.locate(np.arange(plan.num_samples))
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def dealt(num_samples: int, batch: int, world_size: int) -> list[list[int]]:
    """The real positions of each global batch, its ranks' slices laid end to end."""
    steps = []
    for step in range(num_steps(num_samples, batch)):
        found: list[int] = []
        for rank in range(world_size):
            positions, real = batch_positions(num_samples, batch, step, rank_slots(batch, rank, world_size))
            found += positions[real].tolist()
        steps.append(found)
    return steps


@given(sizes=sizes, seed=seeds, epoch=st.integers(0, 9), window=windows)
def test_every_sample_comes_once_an_epoch(sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> None:
    found = order(EpochPlan(sizes, seed, epoch, window))
    assert sorted(found) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


@given(sizes=sizes, seed=seeds, window=windows, data=st.data())
def test_a_position_is_found_without_the_ones_before_it(
    sizes: tuple[int, ...], seed: int, window: int, data: st.DataObject
) -> None:
    sequential = order(EpochPlan(sizes, seed, 3, window))
    wanted = data.draw(st.lists(st.integers(0, len(sequential) - 1), min_size=1, max_size=20))
    shards, rows = EpochPlan(sizes, seed, 3, window).locate(np.array(wanted))
    assert list(zip(shards, rows, strict=True)) == [sequential[position] for position in wanted]


@given(num_samples=st.integers(1, 300), batch=batches, world_size=worlds)
def test_global_batches_are_the_same_for_every_world_size(num_samples: int, batch: int, world_size: int) -> None:
    everything = list(range(num_samples))
    expected = [everything[start : start + batch] for start in range(0, num_samples, batch)]
    assert dealt(num_samples, batch, world_size) == expected


@given(num_samples=st.integers(1, 300), batch=batches, world_size=worlds)
def test_every_rank_takes_as_many_slots_and_padding_repeats_samples_of_the_epoch(
    num_samples: int, batch: int, world_size: int
) -> None:
    taken = [rank_slots(batch, rank, world_size) for rank in range(world_size)]
    assert len({len(slots) for slots in taken}) == 1
    assert sum(map(len, taken)) < batch + world_size
    for step in range(num_steps(num_samples, batch)):
        num_real = 0
        for slots in taken:
            positions, real = batch_positions(num_samples, batch, step, slots)
            assert positions.shape == real.shape == (len(slots),)
            assert ((positions >= 0) & (positions < num_samples)).all()
            num_real += int(real.sum())
        assert num_real == min(batch, num_samples - step * batch)


@pytest.mark.parametrize(("num_samples", "batch", "steps"), [(10, 5, 2), (11, 5, 3), (9, 5, 2), (1, 5, 1), (0, 5, 0)])
def test_last_batch_is_padded_not_dropped(num_samples: int, batch: int, steps: int) -> None:
    assert num_steps(num_samples, batch) == steps


def test_padding_of_the_last_batch_is_masked() -> None:
    positions, real = batch_positions(11, 5, 2, rank_slots(5, 0, 1))
    assert real.tolist() == [True, False, False, False, False]
    assert positions.tolist() == [10, 0, 1, 2, 3]


@given(sizes=sizes, seed=seeds, window=windows)
def test_reads_stay_within_a_window_of_the_shards(sizes: tuple[int, ...], seed: int, window: int) -> None:
    plan = EpochPlan(sizes, seed, 0, window)
    line = [(shard, row) for shard in plan._shard_order.tolist() for row in range(sizes[shard])]
    found = order(plan)
    for start in range(0, len(line), window):
        assert sorted(found[start : start + window]) == sorted(line[start : start + window])


def test_order_follows_seed_and_epoch_alone() -> None:
    sizes = (30, 40, 50)
    first = order(EpochPlan(sizes, 7, 0, 64))
    assert order(EpochPlan(sizes, 7, 0, 64)) == first
    assert order(EpochPlan(sizes, 7, 1, 64)) != first
    assert order(EpochPlan(sizes, 8, 0, 64)) != first
    assert first != sorted(first)


def test_windows_of_an_epoch_are_shuffled_independently() -> None:
    plan = EpochPlan((400,), 7, 0, 100)
    places = np.array(order(plan))[:, 1].reshape(4, 100) - np.arange(0, 400, 100)[:, None]
    assert len({tuple(row) for row in places.tolist()}) == 4


def test_order_is_a_fixed_function_that_no_release_may_change() -> None:
    """A checkpoint holds only (epoch, position): another order after an upgrade would repeat and lose samples."""
    assert order(EpochPlan((3, 2, 4), 7, 1, 5)) == [
        (2, 1),
        (2, 0),
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (2, 3),
        (2, 2),
        (1, 1),
    ]


def test_a_billion_samples_plan_in_the_memory_of_their_shards() -> None:
    num_shards, samples = 100_000, 10_000
    tracemalloc.start()
    try:
        plan = EpochPlan((samples,) * num_shards, 7, 3)
        shards, rows = plan.locate(np.array([0, 123_456_789, 999_999_999]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.num_samples == 10**9
    assert ((shards >= 0) & (shards < num_shards) & (rows >= 0) & (rows < samples)).all()
    assert peak < 100 * num_shards  # bytes; one array of a byte a sample would take a hundred times as much
