"""Buckets: batches of like lengths waste less on padding, and the epoch is still every sample once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmflow.core.errors import RecipeError
from mmflow.loading.permutation import key_of, mix
from mmflow.loading.plan import Buckets, LoaderState, Order, deal_by_length
from tests.loading.test_plan import dealt, epoch_of, epochs, orders, real, samples


def lengths(dataset: int, shard: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Captions' lengths as corpora have them, most short and a few long: from 2 to 65, their logarithms even."""
    words = mix(rows.astype(np.uint64) + key_of(dataset, shard))
    uniform = (words >> np.uint64(11)).astype(np.float64) / 2**53
    return (12 * np.exp(1.7 * (2 * uniform - 1))).astype(np.int64)


def waste(order: Order) -> float:
    """Share of the tokens of an epoch that is padding to the longest of its batch."""
    kept = padded = 0
    for batch in epoch_of(order):
        found = np.array([int(lengths(0, shard, np.array([row]))[0]) for shard, row in real(batch)])
        kept, padded = kept + int(found.sum()), padded + int(found.max()) * len(found)
    return 1 - kept / padded


@given(order=orders, num_batches=st.integers(2, 6), epoch=epochs)
def test_every_sample_still_comes_once_an_epoch_and_only_the_last_batch_is_padded(
    order: Order, num_batches: int, epoch: int
) -> None:
    order = replace(order, buckets=Buckets(num_batches, lengths))
    batches = epoch_of(order, epoch)
    assert sorted(sample for batch in batches for sample in real(batch)) == samples(order)
    assert all(batch.real.all() for batch in batches[:-1])


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
    plain = waste(order)
    assert plain > 0.5
    assert waste(replace(order, buckets=Buckets(16, lengths))) < plain / 3


def test_batches_of_a_group_come_in_no_order_of_length() -> None:
    """Were the short ones first, the loss would go up and down with every group."""
    order = Order(shard_samples=(2_000,), global_batch_size=10, seed=3, buckets=Buckets(20, lengths))
    means = np.array([np.mean([lengths(0, 0, np.array([row]))[0] for _, row in real(b)]) for b in epoch_of(order)])
    ranks = np.argsort(np.argsort(means.reshape(10, 20), axis=1), axis=1)
    assert abs(np.corrcoef(ranks.ravel(), np.tile(np.arange(20), 10))[0, 1]) < 0.3
    assert len({tuple(group) for group in ranks.tolist()}) == 10


def test_an_epoch_deals_its_samples_to_other_batches_than_the_last() -> None:
    order = Order(shard_samples=(400,), global_batch_size=10, seed=3, buckets=Buckets(8, lengths))
    assert dealt(order) != dealt(order, 1)


def test_deal_by_length_gives_each_batch_a_run_of_the_sorted_lengths() -> None:
    found = deal_by_length(np.array([5, 1, 4, 1, 3]), [2, 2, 1], np.array([2, 0, 1]))
    assert [indices.tolist() for indices in found] == [[2, 0], [1, 3], [4]]


def test_a_position_within_a_batch_is_refused() -> None:
    order = Order(shard_samples=(100,), global_batch_size=8, seed=3, buckets=Buckets(4, lengths))
    with pytest.raises(RecipeError, match=r"^training\.global_batch_size: no batch of 8 begins at .* position 12;"):
        order.batch(LoaderState(0, 12))
