"""Retrieval metrics against hand-computed cases, with one right answer and several. Ties count against the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.learning.retrieval import (
    QueryRanks,
    chance_metrics,
    rank_one,
    rank_several,
    ranks_of_right,
    retrieval_metrics,
)

NAN = float("nan")


SCORES = np.array([[0.9, 0.1, 0.2, 0.3], [0.8, 0.5, 0.4, 0.3], [0.9, 0.8, 0.1, 0.2], [0.1, 0.9, 0.4, 0.5]])


@pytest.mark.parametrize(
    ("similarity", "ranks"),
    [
        (SCORES, [1, 2, 4, 2]),
        (SCORES.T, [2, 3, 4, 1]),
        (np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.5], [0.1, 0.1, 0.5]]), [2, 3, 1]),
        (np.array([[NAN, 0.1, 0.2], [0.3, 0.9, NAN], [0.1, 0.2, 0.9]]), [3, 2, 1]),
        (np.full((4, 4), NAN), [4, 4, 4, 4]),
        (np.full((3, 3), -np.inf), [3, 3, 3]),
    ],
)
def test_rank_counts_higher_scores_and_ties_and_nan_ranks_last(similarity: Any, ranks: list[int]) -> None:
    assert ranks_of_right(similarity).tolist() == ranks


def test_a_collapsed_model_recalls_nothing() -> None:
    """All embeddings equal: an optimistic rank would report a perfect model."""
    embeddings = np.tile(np.array([[0.6, 0.8]], np.float32), (20, 1))
    expected = {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "mAP": 0.05, "mean_rank": 20.0, "median_rank": 20.0}
    assert retrieval_metrics(rank_one(embeddings @ embeddings.T)) == pytest.approx(expected)


def query_ranks(*ranks: int) -> QueryRanks:
    return QueryRanks(np.array(ranks), 1 / np.array(ranks))


def test_metrics_by_hand() -> None:
    assert retrieval_metrics(query_ranks(1, 1, 2, 6, 11, 30)) == {
        "R@1": pytest.approx(2 / 6),
        "R@5": pytest.approx(3 / 6),
        "R@10": pytest.approx(4 / 6),
        "mAP": pytest.approx((1 + 1 + 1 / 2 + 1 / 6 + 1 / 11 + 1 / 30) / 6),
        "mean_rank": pytest.approx(51 / 6),
        "median_rank": 4.0,
    }
    assert retrieval_metrics(query_ranks(3, 4), recall_at=(3,)) == {
        "R@3": 0.5,
        "mAP": pytest.approx((1 / 3 + 1 / 4) / 2),
        "mean_rank": 3.5,
        "median_rank": 3.5,
    }


def test_a_picture_has_the_rank_of_its_first_right_caption() -> None:
    pictures = np.array([[0.9, 0.1, 0.8, 0.5, 0.7], [0.9, 0.1, 0.2, 0.3, 0.8]])
    result = rank_several(pictures, np.array([0, 0, 1, 1, 1]))
    # The first picture's captions are first and last of five; of the second's, places two, three and four.
    assert result.ranks.tolist() == [1, 2]
    assert result.precision.tolist() == pytest.approx([(1 / 1 + 2 / 5) / 2, (1 / 2 + 2 / 3 + 3 / 4) / 3])


def test_a_caption_finds_its_picture_wherever_that_stands() -> None:
    captions = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    assert rank_one(captions, np.array([0, 0, 1])).ranks.tolist() == [1, 2, 1]


def test_ties_with_wrong_captions_lower_the_rank_and_ties_with_right_ones_do_not() -> None:
    owner = np.array([0, 0, 1])
    assert rank_several(np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.5]]), owner).ranks.tolist() == [1, 3]
    assert rank_several(np.array([[NAN, 0.5, 0.4], [0.1, NAN, 0.9]]), owner).ranks.tolist() == [1, 2]
    worst = rank_several(np.full((2, 3), NAN), owner)
    assert worst.ranks.tolist() == [2, 3]
    assert worst.precision.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1 / 3])


def test_a_collapsed_model_finds_none_of_several_captions() -> None:
    metrics = retrieval_metrics(rank_several(np.zeros((10, 50)), np.repeat(np.arange(10), 5)))
    assert (metrics["R@1"], metrics["R@10"], metrics["mean_rank"]) == (0.0, 0.0, 46.0)


def test_chance_by_hand_and_by_guessing() -> None:
    assert chance_metrics(20) == {
        "R@1": pytest.approx(0.05),
        "R@5": pytest.approx(0.25),
        "R@10": pytest.approx(0.5),
        "mAP": pytest.approx(sum(1 / rank for rank in range(1, 21)) / 20),
        "mean_rank": 10.5,
        "median_rank": 10.5,
    }
    three = {"R@1": pytest.approx(1 / 3), "R@5": 1.0, "R@10": 1.0, "mAP": pytest.approx(11 / 18), "mean_rank": 2}
    assert chance_metrics(3) == {**three, "median_rank": 2}
    guesses = [rank_one(np.random.default_rng(seed).random((20, 20))) for seed in range(500)]
    assert mean_metrics(guesses) == pytest.approx(chance_metrics(20), rel=0.1)


def test_chance_with_several_right_captions_by_guessing() -> None:
    owner = np.array([0] * 7 + [1] * 6 + [2] * 1 + [3] * 1 + [4] * 5)
    guesses = [rank_several(np.random.default_rng(seed).random((5, 20)), owner) for seed in range(1500)]
    assert mean_metrics(guesses) == pytest.approx(chance_metrics(20, np.bincount(owner)), rel=0.1)


def mean_metrics(guesses: list[QueryRanks]) -> dict[str, float]:
    ranks, precision = zip(*((guess.ranks, guess.precision) for guess in guesses), strict=True)
    return retrieval_metrics(QueryRanks(np.concatenate(ranks), np.concatenate(precision)))


def plain_search(scores: list[float], right: set[int]) -> tuple[int, float]:
    """Rank and average precision by walking down the list, wrong candidates before right ones that tie with them."""

    def place(candidate: int) -> tuple[float, bool]:
        score = scores[candidate]
        worst = float("inf") if candidate in right else float("-inf")
        return (worst if np.isnan(score) else -score, candidate in right)

    ordered = sorted(range(len(scores)), key=place)
    hits = [number for number, candidate in enumerate(ordered, start=1) if candidate in right]
    return hits[0], float(np.mean([(count + 1) / number for count, number in enumerate(hits)]))


@given(data=st.data(), pictures=st.integers(1, 5), levels=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_several_right_answers_equal_a_walk_down_the_list(
    data: st.DataObject, pictures: int, levels: int, seed: int
) -> None:
    extra = data.draw(st.lists(st.integers(0, pictures - 1), max_size=8))
    owner = np.array([*range(pictures), *extra])
    random = np.random.default_rng(seed)
    random.shuffle(owner)
    scores = random.integers(0, levels, (pictures, len(owner))).astype(np.float32)
    scores[scores == levels - 1] = random.choice([NAN, 9.0])
    result = rank_several(scores, owner)
    for picture in range(pictures):
        rank, precision = plain_search(scores[picture].tolist(), set(np.flatnonzero(owner == picture).tolist()))
        assert result.ranks[picture] == rank
        assert result.precision[picture] == pytest.approx(precision)


@given(size=st.integers(1, 12), levels=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_ranks_equal_a_plain_count(size: int, levels: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).integers(0, levels, (size, size)).astype(np.float32)
    expected = [1 + sum(similarity[i, j] >= similarity[i, i] for j in range(size) if j != i) for i in range(size)]
    assert ranks_of_right(similarity).tolist() == expected
