"""The order of one epoch: positions found alone, windows and lanes each shuffled in its own way."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmflow.loading.epoch import EpochPlan
from mmflow.loading.plan import Order
from tests.loading.test_plan import epochs, orders


@given(order=orders, epoch=epochs, data=st.data())
def test_a_position_is_found_without_the_ones_before_it(order: Order, epoch: int, data: st.DataObject) -> None:
    plan = EpochPlan(order.shard_samples, order.seed, epoch, order.window, order.lanes)
    every = list(zip(*(found.tolist() for found in plan.locate(np.arange(plan.num_samples))), strict=True))
    wanted = data.draw(st.lists(st.integers(0, plan.num_samples - 1), min_size=1, max_size=20))
    found = zip(*(found.tolist() for found in plan.locate(np.array(wanted))), strict=True)
    assert list(found) == [every[position] for position in wanted]


def test_windows_and_lanes_of_an_epoch_are_shuffled_each_in_its_own_way() -> None:
    plan = EpochPlan((4_000,), 7, 0, 100, 4)
    _, found = plan.locate(np.arange(4_000))
    # (window, place, lane) to (window and lane, place)
    places = found.reshape(10, 100, 4).transpose(0, 2, 1).reshape(40, 100)
    ranks = np.argsort(np.argsort(places, axis=1), axis=1)
    assert len({tuple(row) for row in ranks.tolist()}) == 40
    correlations = np.corrcoef(ranks)[~np.eye(40, dtype=bool)]
    assert np.abs(correlations).max() < 0.5  # 1/sqrt(100) is one standard deviation


def test_shards_are_read_in_another_order_each_epoch() -> None:
    plans = [EpochPlan((10,) * 50, 3, epoch, 1, 1) for epoch in range(4)]
    lines = [tuple(plan.locate(np.arange(0, 500))[0].tolist()) for plan in plans]
    assert len({tuple(dict.fromkeys(line)) for line in lines}) == 4
