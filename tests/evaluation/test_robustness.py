"""Robustness by hand: pairs preferred and retrieval lost."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from mmflow.evaluation.robustness import preference, recall_drop
from mmflow.inference.changes import PERTURBATIONS, Perturbation

NAN = float("nan")


def test_the_settings_name_every_perturbation() -> None:
    assert set(get_args(Perturbation)) == set(PERTURBATIONS)


@pytest.mark.parametrize(
    ("true", "changed", "accuracy"),
    [
        ([0.9, 0.2, 0.5, 0.4], [0.1, 0.3, 0.4, 0.2], 0.75),
        ([0.5, 0.5], [0.5, 0.5], 0.0),  # a model that reads no word order
        ([NAN, 0.5, 0.5], [0.1, NAN, 0.4], 1 / 3),
        ([], [], 0.0),
    ],
)
def test_ties_and_numbers_that_are_none_count_against_the_model(
    true: list[float], changed: list[float], accuracy: float
) -> None:
    found = preference(np.array(true), np.array(changed))
    assert found == {"accuracy": pytest.approx(accuracy), "rows": float(len(true))}


@pytest.mark.parametrize(
    ("clean", "changed", "recall", "drop"),
    [
        ([1, 1, 2, 1], [1, 3, 1, 2], 0.5, 1 / 3),
        ([1, 1], [2, 9], 0.0, 1.0),
        ([1, 2], [1, 1], 1.0, -1.0),
        ([2, 3], [1, 2], 0.5, 0.0),  # nothing to lose
        ([], [], 0.0, 0.0),
    ],
)
def test_the_drop_is_the_lost_share_of_the_clean_recall(
    clean: list[int], changed: list[int], recall: float, drop: float
) -> None:
    found = recall_drop(np.array(clean, np.int64), np.array(changed, np.int64), recall_at=(1,))
    assert found == {"R@1": recall, "R@1_drop": pytest.approx(drop), "rows": float(len(clean))}


def test_every_depth_has_its_own_drop() -> None:
    found = recall_drop(np.array([1, 1, 6, 20]), np.array([1, 2, 11, 30]))
    assert [found[f"R@{k}_drop"] for k in (1, 5, 10)] == pytest.approx([1 / 2, 0, 1 / 3])
