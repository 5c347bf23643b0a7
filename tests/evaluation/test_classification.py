"""Classes told apart: counts by hand and by a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.evaluation.classification import (
    ZeroShotConfig,
    class_metrics,
    confusion,
    majority_metrics,
    metrics_of,
    zero_shot_metrics,
)

NAMES = ["cat", "dog", "cow"]


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


def test_a_model_without_an_answer_is_never_right() -> None:
    found, _ = metrics_of([None] * 10, NAMES, ["cat"] * 10)
    assert found["accuracy"] == 0.0
    assert majority_metrics(NAMES, ["cat"] * 10)["accuracy"] == 1.0


def test_rows_of_no_known_class_are_left_out() -> None:
    found, counts = metrics_of(NAMES, NAMES, ["cat", None, "horse"])
    assert (found["rows"], found["accuracy"]) == (1.0, 1.0)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_metrics_equal_a_plain_count(rows: list[tuple[int, int]]) -> None:
    answers, right = (np.array(column) for column in zip(*rows, strict=True))
    found = class_metrics(confusion(answers, right, 3))
    assert found["accuracy"] == pytest.approx(np.mean([answer == truth for answer, truth in rows]))
    by_class = []
    for number in sorted(set(right.tolist())):
        hits = sum(answer == truth == number for answer, truth in rows)
        answered, there = sum(answer == number for answer, _ in rows), sum(truth == number for _, truth in rows)
        by_class.append((hits / answered if answered else 0.0, hits / there, 2 * hits / (answered + there)))
    for name, values in zip(("precision", "recall", "F1"), zip(*by_class, strict=True), strict=True):
        assert found[name] == pytest.approx(np.mean(values)), name


def test_majority_by_hand() -> None:
    labels = ["cat", "cat", "dog", None, "horse"]
    assert zero_shot_metrics(majority_metrics(NAMES, labels)) == {
        "accuracy": pytest.approx(2 / 3),
        "mean_class_accuracy": 0.5,
        "classes": 3.0,
        "rows": 3.0,
    }
    assert majority_metrics(NAMES, [None])["accuracy"] == 0.0


def test_a_model_that_always_answers_one_class_shows_in_the_mean_over_classes() -> None:
    labels = ["cat"] * 8 + ["dog", "cow"]
    found, _ = metrics_of(["cat"] * 10, NAMES, labels)
    assert (found["accuracy"], found["recall"]) == (pytest.approx(0.8), pytest.approx(1 / 3))
    assert majority_metrics(NAMES, labels) == found


def test_templates_multiply_the_prompts() -> None:
    config = ZeroShotConfig(label="k", prompts={"cat": ["cat", "kitten"], "dog": ["dog"]}, templates=["{}", "a {}."])
    assert config.texts == {"cat": ["cat", "kitten", "a cat.", "a kitten."], "dog": ["dog", "a dog."]}
    assert ZeroShotConfig(label="k", prompts={"a": ["x"], "b": ["y"]}).texts == {"a": ["x"], "b": ["y"]}
    with pytest.raises(ValueError, match=r"has no \{\}"):
        ZeroShotConfig(label="k", prompts={"a": ["x"], "b": ["y"]}, templates=["a photo"])
