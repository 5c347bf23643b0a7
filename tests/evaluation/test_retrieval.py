"""Retrieval by hand-computed cases; whatever cannot be told apart counts against the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.evaluation.retrieval import chance_metrics, ranks_of_right, retrieval_metrics

NAN = float("nan")


def test_rank_is_one_more_than_the_number_that_score_higher() -> None:
    similarity = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # first
            [0.8, 0.5, 0.4, 0.3],  # second
            [0.9, 0.8, 0.1, 0.2],  # last
            [0.1, 0.9, 0.4, 0.5],  # second
        ]
    )
    assert ranks_of_right(similarity).tolist() == [1, 2, 4, 2]
    assert ranks_of_right(similarity.T).tolist() == [2, 3, 4, 1]


def test_ties_count_against_the_model() -> None:
    assert ranks_of_right(np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.5], [0.1, 0.1, 0.5]])).tolist() == [2, 3, 1]


def test_what_is_not_a_number_ranks_last() -> None:
    similarity = np.array([[NAN, 0.1, 0.2], [0.3, 0.9, NAN], [0.1, 0.2, 0.9]])
    assert ranks_of_right(similarity).tolist() == [3, 2, 1]
    assert ranks_of_right(np.full((4, 4), NAN)).tolist() == [4, 4, 4, 4]
    assert ranks_of_right(np.full((3, 3), -np.inf)).tolist() == [3, 3, 3]


def test_a_collapsed_model_recalls_nothing() -> None:
    """All embeddings equal: an optimistic rank would report a perfect model."""
    embeddings = np.tile(np.array([[0.6, 0.8]], np.float32), (20, 1))
    metrics = retrieval_metrics(ranks_of_right(embeddings @ embeddings.T))
    assert metrics == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "mean_rank": 20.0, "median_rank": 20.0}


def test_metrics_by_hand() -> None:
    assert retrieval_metrics(np.array([1, 1, 2, 6, 11, 30])) == {
        "R@1": pytest.approx(2 / 6),
        "R@5": pytest.approx(3 / 6),
        "R@10": pytest.approx(4 / 6),
        "mean_rank": pytest.approx(51 / 6),
        "median_rank": 4.0,
    }
    assert retrieval_metrics(np.array([3, 4]), recall_at=(3,)) == {"R@3": 0.5, "mean_rank": 3.5, "median_rank": 3.5}


def test_chance_by_hand_and_by_guessing() -> None:
    assert chance_metrics(20) == {"R@1": 0.05, "R@5": 0.25, "R@10": 0.5, "mean_rank": 10.5, "median_rank": 10.5}
    assert chance_metrics(3) == {"R@1": pytest.approx(1 / 3), "R@5": 1.0, "R@10": 1.0, "mean_rank": 2, "median_rank": 2}
    guessed = [ranks_of_right(np.random.default_rng(seed).random((20, 20))) for seed in range(500)]
    for name, value in retrieval_metrics(np.concatenate(guessed)).items():
        assert value == pytest.approx(chance_metrics(20)[name], rel=0.1), name


@given(size=st.integers(1, 12), levels=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_ranks_equal_a_plain_count(size: int, levels: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).integers(0, levels, (size, size)).astype(np.float32)
    expected = [1 + sum(similarity[i, j] >= similarity[i, i] for j in range(size) if j != i) for i in range(size)]
    assert ranks_of_right(similarity).tolist() == expected
