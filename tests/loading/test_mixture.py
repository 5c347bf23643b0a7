"""Mixtures: each dataset gives every sample once in each of its own epochs, in the same batches on any ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmflow.core.errors import RecipeError
from mmflow.loading.config import MixtureConfig
from mmflow.loading.mixture import WHOLE, MixtureOrder, apportion, shares_of, timeline, to_shares
from mmflow.loading.plan import Buckets, LoaderState, Slots, rank_slice
from tests.loading.test_plan import lengths, stored, waste

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


def plain_mixture(shard_samples: tuple[tuple[int, ...], ...], weights: list[float], batch: int) -> MixtureOrder:
    return MixtureOrder(shard_samples, {0: to_shares(weights)}, batch, seed=1)


def real(slots: Slots) -> list[Sample]:
    columns = (slots.dataset, slots.epoch, slots.shard, slots.row)
    return list(zip(*(column[slots.real].tolist() for column in columns), strict=True))


def states(order: MixtureOrder, state: LoaderState, steps: int) -> Iterator[LoaderState]:
    for _ in range(steps):
        yield state
        state = order.after(state)


def batches(order: MixtureOrder, steps: int) -> list[Slots]:
    return [order.batch(state) for state in states(order, LoaderState(), steps)]


@given(order=mixtures(), steps=st.integers(1, 10))
def test_each_dataset_gives_every_sample_once_in_each_of_its_own_epochs(order: MixtureOrder, steps: int) -> None:
    group = order.buckets.batches if order.buckets else 1
    drawn_batches = batches(order, -(-steps // group) * group)  # buckets deal whole groups
    assert all(batch.real.all() and len(batch) == order.global_batch_size for batch in drawn_batches)
    counts = Counter(sample for batch in drawn_batches for sample in real(batch))
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
    state, keys = LoaderState(), []
    for world_size, run in zip(worlds, np.diff([0, *stops, steps]).tolist(), strict=True):
        resumed = replace(order)
        state = stored(state)
        for reached in states(resumed, state, run):
            ranks = [rank_slice(resumed.batch(reached), rank, world_size) for rank in range(world_size)]
            assert len({len(rank) for rank in ranks}) == 1
            keys.append([sample for rank in ranks for sample in real(rank)])
            state = resumed.after(reached)
    assert keys == [real(batch) for batch in batches(order, steps)]
    assert state.position == steps * order.global_batch_size


def test_a_state_holds_one_number_a_dataset_however_long_the_training() -> None:
    order = MixtureOrder(shard_samples=((40,), (10, 10)), shares={0: to_shares([3, 1])}, global_batch_size=8, seed=1)
    *_, state = states(order, LoaderState(), 1_001)
    assert state == LoaderState(0, 8_000, (6_000, 2_000))
    assert Counter(batch := order.batch(state).dataset.tolist()) == {0: 6, 1: 2}, batch


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
def test_read_ahead_covers_the_batch_and_stays_within_the_shards(
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
    rows = [[row for batch in batches(order, 12) for of, _, _, row in real(batch) if of == number] for number in (0, 1)]
    assert sorted(rows[0]) == sorted(rows[1])
    assert rows[0] != rows[1]


def test_buckets_give_every_dataset_its_shortest_samples_in_the_same_batch() -> None:
    plain = MixtureOrder(shard_samples=((400,), (400,)), shares={0: to_shares([1, 1])}, global_batch_size=16, seed=1)
    bucketed = replace(plain, buckets=Buckets(8, lengths))
    assert waste(batches(bucketed, 48)) < waste(batches(plain, 48)) / 2


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


# --- what each dataset gives ------------------------------------------------------------------------------------------


@st.composite
def weights_by_step(draw: st.DrawFn) -> list[tuple[int, list[float]]]:
    """Up to four changes of the weights of up to seven datasets, some of them weighing nothing, or next to nothing."""
    num_datasets = draw(st.integers(1, 7))
    weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e-3), st.floats(0.01, 1), st.integers(1, 9).map(float))
    weights = st.lists(weight, min_size=num_datasets, max_size=num_datasets).filter(any)
    steps = [0, *sorted(draw(st.sets(st.integers(1, 60), max_size=4)))]
    return [(step, draw(weights)) for step in steps]


def drawn_by_step(shares: Mapping[int, tuple[int, ...]], batch: int, steps: int) -> list[tuple[int, ...]]:
    """The samples drawn from each dataset before each step."""
    segments = timeline(shares, batch)
    totals = [(0,) * len(shares[0])]
    for step in range(1, steps + 1):
        totals.append(apportion(segments, totals[-1], step * batch))
    return totals


def mixture(**settings: object) -> MixtureConfig:
    return MixtureConfig.model_validate({"datasets": [{"uri": "one"}, {"uri": "two"}], **settings})


@given(changes=weights_by_step(), batch=st.integers(1, 40))
def test_every_dataset_stays_within_one_sample_of_its_weights_at_every_step(
    changes: list[tuple[int, list[float]]], batch: int
) -> None:
    asked = [0.0] * len(changes[0][1])
    totals = drawn_by_step({step: to_shares(weights) for step, weights in changes}, batch, 80)
    for step, (before, after) in enumerate(pairwise(totals)):
        weights = next(weights for first, weights in reversed(changes) if first <= step)
        asked = [owed + batch * weight / sum(weights) for owed, weight in zip(asked, weights, strict=True)]
        assert sum(after) - sum(before) == batch
        assert all(last <= now for last, now in zip(before, after, strict=True))
        assert all(abs(now - owed) < 1 for now, owed in zip(after, asked, strict=True)), (after, asked)
        # What never weighed anything is never drawn; what weighs nothing any more may still owe a sample.
        assert not any(now for now, owed in zip(after, asked, strict=True) if not owed)


def test_batches_of_one_sample_alternate_between_datasets() -> None:
    """A dataset that always came last would starve those who wait for a whole batch."""
    totals = drawn_by_step({0: to_shares([1.0, 1.0, 2.0])}, 1, 8)
    chosen = [[now - last for last, now in zip(*pair, strict=True)].index(1) for pair in pairwise(totals)]
    assert sorted(chosen[:4]) == sorted(chosen[4:]) == [0, 1, 2, 2]


def test_shares_stay_exact_after_a_trillion_samples() -> None:
    segments = timeline({0: to_shares([1.0, 2.0, 5.0])}, 8)
    far = 10**12
    drawn = (far // 8, 2 * far // 8, 5 * far // 8)
    after = apportion(segments, drawn, far + 8)
    assert [now - last for last, now in zip(drawn, after, strict=True)] == [1, 2, 5]


def test_weights_change_at_once_at_the_step_that_the_curriculum_names() -> None:
    changes = shares_of(
        mixture(curriculum=[{"step": 3, "weights": [0, 1, 3]}, {"step": 5, "weights": [1, 0, 0]}]), [5, 5, 10]
    )
    totals = drawn_by_step(changes, 8, 7)
    steps = [tuple(now - last for last, now in zip(*pair, strict=True)) for pair in pairwise(totals)]
    assert steps == [(2, 2, 4)] * 3 + [(0, 2, 6)] * 2 + [(8, 0, 0)] * 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.01, 0.09, 0.9]),
        ({"weighting": "temperature", "temperature": 2}, [0.074146, 0.222439, 0.703415]),
        ({"weighting": "temperature", "temperature": 1e6}, [1 / 3] * 3),
        ({"weighting": "temperature", "temperature": 0.001}, [0, 0, 1]),
        ({"weighting": "fixed", "weights": [6, 3, 1]}, [0.6, 0.3, 0.1]),
    ],
)
def test_weights_follow_the_samples_their_temperature_or_the_recipe(
    settings: dict[str, object], expected: list[float]
) -> None:
    shares = shares_of(mixture(**settings), [100, 900, 9_000])[0]
    assert sum(shares) == WHOLE
    assert [share / WHOLE for share in shares] == pytest.approx(expected, abs=1e-5)


def test_a_curriculum_from_the_first_step_on_replaces_the_weights() -> None:
    changes = shares_of(mixture(curriculum=[{"step": 0, "weights": [1, 1, 2]}]), [5, 5, 5])
    assert changes == {0: (WHOLE // 4, WHOLE // 4, WHOLE // 2)}


@given(weights=st.lists(st.floats(0, 1e9), min_size=1, max_size=9).filter(lambda values: sum(values) > 1e-3))
def test_shares_are_whole_sum_to_all_and_lose_less_than_one(weights: list[float]) -> None:
    shares = to_shares(weights)
    assert sum(shares) == WHOLE
    total = math.fsum(weights)
    assert all(abs(share - weight / total * WHOLE) < 1 for share, weight in zip(shares, weights, strict=True))


def test_weight_on_a_dataset_without_samples_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^loader\.mixture: dataset 1 .* has weight 2 from step 7 on, .* no samples"):
        shares_of(mixture(curriculum=[{"step": 7, "weights": [1, 2, 1]}]), [5, 0, 5])
    with pytest.raises(RecipeError, match=r"^loader\.mixture: no dataset has samples"):
        shares_of(mixture(), [0, 0, 0])


def test_counts_of_another_mixture_are_refused() -> None:
    segments = timeline({0: to_shares([1.0, 1.0])}, 8)
    with pytest.raises(RecipeError, match=r"drew \[30, 10\], but these weights give \[24, 24\]"):
        apportion(segments, (30, 10), 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "fixed"}, "weights go with weighting: fixed"),
        ({"weights": [1, 1, 1]}, "weights go with weighting: fixed, but it is proportional"),
        ({"temperature": 2}, "temperature goes with weighting: temperature, but it is proportional"),
        ({"weighting": "fixed", "weights": [1, 1]}, "got 2 for 3 datasets"),
        ({"weighting": "fixed", "weights": [1, -1, 1]}, "at least 0 and one must be above 0"),
        ({"weighting": "fixed", "weights": [0, 0, 0]}, "at least 0 and one must be above 0"),
        ({"weighting": "fixed", "weights": [1, 1, math.nan]}, "at least 0 and one must be above 0"),
        ({"weighting": "fixed", "weights": [1, 1, math.inf]}, "at least 0 and one must be above 0"),
        ({"curriculum": [{"step": 4, "weights": [1, 1]}]}, "got 2 for 3 datasets"),
        ({"curriculum": [{"step": step, "weights": [1, 1, 1]} for step in (4, 4)]}, r"increase, got \[4, 4\]"),
        ({"curriculum": [{"step": step, "weights": [1, 1, 1]} for step in (9, 4)]}, r"increase, got \[9, 4\]"),
        ({"datasets": []}, "at least 1 item"),
    ],
)
def test_invalid_weights_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        mixture(**settings)
