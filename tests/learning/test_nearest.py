"""The nearest candidates, from blocks of them, against a stable sort of all scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmflow.learning.nearest import Nearest, nearest_in_tiles

NAN, INF = float("nan"), float("inf")


def expected_places(scores: NDArray[Any], count: int) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


@given(
    seed=st.integers(0, 2**32),
    levels=st.integers(1, 6),
    count=st.integers(0, 12),
    sizes=st.lists(st.integers(0, 20), max_size=6),
)
def test_blocks_of_scores_are_merged_as_if_they_were_one(seed: int, levels: int, count: int, sizes: list[int]) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(-levels, levels, (7, sum(sizes))).astype(np.float32) * random.choice([-1, 1])  # 0 and -0
    scores[random.random(scores.shape) < random.choice([0, 0.1, 0.9])] = random.choice([NAN, INF, -INF])
    nearest = Nearest(7, count, torch.device("cpu"))
    for block in np.split(scores, np.cumsum(sizes)[:-1], axis=1) if sizes else []:
        nearest.add(torch.from_numpy(block))
    places = expected_places(scores, count)
    assert nearest.places_QK.tolist() == places.tolist()
    expected_scores = np.take_along_axis(scores, places, axis=1)
    assert np.array_equal(nearest.scores_QK.numpy(), expected_scores, equal_nan=True)


@pytest.mark.parametrize("tile", [16, 50, None])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("num_queries", [0, 1, 90])
def test_candidates_come_in_blocks_of_any_size(tile: int | None, dtype: Any, num_queries: int) -> None:
    random = np.random.default_rng(num_queries)
    queries = random.integers(-2, 3, (num_queries, 4)).astype(dtype)
    candidates = random.integers(-2, 3, (200, 4)).astype(dtype)
    candidates.flags.writeable = False  # as columns of a Parquet file are
    scores = queries.astype(np.float32) @ candidates.astype(np.float32).T
    for bounds in ([], [1, 60, 60, 177]):
        places, found = nearest_in_tiles(queries, iter(np.split(candidates, bounds)), 7, tile=tile)
        assert places.tolist() == expected_places(scores, 7).tolist()
        assert np.array_equal(found, np.take_along_axis(scores, places, axis=1))
        assert (places.dtype, found.dtype) == (np.int64, np.float32)


def test_fewer_candidates_than_asked_for_are_all_returned() -> None:
    places, scores = nearest_in_tiles(torch.tensor([[1.0], [-1.0]]), [torch.tensor([[1.0], [3.0]])], 5)
    assert places.tolist() == [[1, 0], [0, 1]]
    assert scores.tolist() == [[3.0, 1.0], [-1.0, -3.0]]
