"""Classes told apart: counts by hand, and no answer where a model cannot choose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.evaluation.classification import class_metrics, confusion, majority_metrics, metrics_of, predicted

NAMES = ["cat", "dog", "cow"]


def test_the_best_score_is_the_answer_unless_it_is_shared_or_not_a_number() -> None:
    scores = np.array([[0.1, 0.9, 0.2], [0.5, 0.5, 0.1], [np.nan, 0.9, 0.1], [-np.inf] * 3, [0.0, -np.inf, -1.0]])
    assert predicted(scores).tolist() == [1, -1, -1, -1, 0]


def test_a_confusion_counts_rows_by_class_and_answer_and_those_without_an_answer_last() -> None:
    counts = confusion(np.array([0, 1, 1, -1, 2]), np.array([0, 0, 1, 1, 0]), 3)
    assert counts.tolist() == [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_metrics_by_hand() -> None:
    # Two of four cats found, three rows called dog of which two are, no cow at all.
    assert class_metrics(np.array([[2, 1, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0]])) == {
        "accuracy": pytest.approx(4 / 6),
        "precision": pytest.approx((1 + 2 / 3) / 2),
        "recall": pytest.approx((1 / 2 + 1) / 2),
        "F1": pytest.approx((2 / 3 + 4 / 5) / 2),
        "classes": 3.0,
        "rows": 6.0,
    }


def test_nothing_right_and_no_rows_are_zeros() -> None:
    for counts in (np.array([[0, 3, 0], [2, 0, 1]]), np.zeros((2, 3), np.int64)):
        found = class_metrics(counts)
        assert [found[name] for name in ("accuracy", "precision", "recall", "F1")] == [0.0] * 4


def test_a_model_that_scores_every_class_alike_is_never_right() -> None:
    found, _ = metrics_of(np.ones((10, 3)), NAMES, ["cat"] * 10)
    assert found["accuracy"] == 0.0
    assert majority_metrics(NAMES, ["cat"] * 10)["accuracy"] == 1.0


def test_rows_of_no_known_class_are_left_out() -> None:
    found, counts = metrics_of(np.eye(3), NAMES, ["cat", None, "horse"])
    assert (found["rows"], found["accuracy"]) == (1.0, 1.0)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_metrics_equal_a_plain_count(rows: list[tuple[int, int]]) -> None:
    answers, right = (np.array(column) for column in zip(*rows, strict=True))
    found = class_metrics(confusion(answers, right, 3))
    assert found["accuracy"] == pytest.approx(np.mean([answer == truth for answer, truth in rows]))
    by_class = []
    for each in sorted(set(right.tolist())):
        hits = sum(answer == truth == each for answer, truth in rows)
        said, there = sum(answer == each for answer, _ in rows), sum(truth == each for _, truth in rows)
        precision, recall = hits / said if said else 0.0, hits / there
        by_class.append((precision, recall, 2 * hits / (said + there)))
    for name, values in zip(("precision", "recall", "F1"), zip(*by_class, strict=True), strict=True):
        assert found[name] == pytest.approx(np.mean(values)), name
