"""Slices of a metric: means by hand, and none of too few rows."""

from __future__ import annotations

import numpy as np
import pytest

from mmflow.evaluation.slices import LEAST_ROWS, MOST_LABELS, by_label, by_length


def test_labels_are_means_of_their_rows_the_commonest_first() -> None:
    labels = ["cat"] * 20 + [None] * 30 + ["dog"] * 25 + ["cow"] * 19
    outcomes = np.array([1, 0] * 10 + [1] * 30 + [0] * 5 + [1] * 20 + [1] * 19)
    values, left_out = by_label(outcomes, labels)
    assert list(values.items()) == [
        ("dog", {"value": pytest.approx(0.8), "rows": 25.0}),
        ("cat", {"value": pytest.approx(0.5), "rows": 20.0}),
    ]
    assert left_out == 1


def test_only_the_commonest_labels_are_shown() -> None:
    counts = {f"label {number:02}": LEAST_ROWS + number for number in range(MOST_LABELS + 5)}
    labels = [label for label, count in counts.items() for _ in range(count)]
    values, left_out = by_label(np.ones(len(labels), dtype=np.bool_), labels)
    assert list(values) == sorted(counts, reverse=True)[:MOST_LABELS]
    assert left_out == 5
    equally_many = [f"label {number:02}" for number in range(MOST_LABELS + 1)] * LEAST_ROWS
    assert "label 40" not in by_label(np.ones(len(equally_many)), equally_many).values


def test_lengths_are_means_of_their_range_the_shortest_first() -> None:
    lengths = np.array([0, 8] * 10 + [9, 16] * 10 + [17] * 19 + [129, 5000] * 10)
    outcomes = np.where(lengths == 9, 0.5, lengths > 9)
    values, left_out = by_length(outcomes, lengths)
    assert list(values.items()) == [
        ("0-8", {"value": 0.0, "rows": 20.0}),
        ("9-16", {"value": 0.75, "rows": 20.0}),
        ("129+", {"value": 1.0, "rows": 20.0}),
    ]
    assert left_out == 1


def test_no_rows_are_no_slices() -> None:
    nothing = np.zeros(0)
    assert by_label(nothing, []) == by_length(nothing, np.zeros(0, np.int64)) == ({}, 0)
