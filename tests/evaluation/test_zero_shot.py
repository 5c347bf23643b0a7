"""Classes by their names: shares of rows and means of classes, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mmflow.evaluation.zero_shot import majority_metrics, zero_shot_metrics
from mmflow.inference import embed
from mmflow.inference.embed import class_embeddings

NAMES = ["cat", "dog", "cow"]
CLASSES = np.eye(3, dtype=np.float32)


def pictures(*nearest: int) -> np.ndarray:
    """An embedding beside the class of that number, a little off."""
    rows = np.eye(3, dtype=np.float32)[list(nearest)] + 0.1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_accuracy_is_over_rows_and_its_mean_over_classes() -> None:
    images = pictures(0, 0, 0, 1, 1, 2)
    labels = ["cat", "cat", "cat", "cat", "dog", "cow"]
    assert zero_shot_metrics(images, CLASSES, NAMES, labels) == {
        "accuracy": pytest.approx(5 / 6),
        "mean_class_accuracy": pytest.approx((3 / 4 + 1 + 1) / 3),
        "classes": 3.0,
        "rows": 6.0,
    }


def test_rows_of_no_class_or_another_are_left_out() -> None:
    found = zero_shot_metrics(pictures(0, 1, 2, 0), CLASSES, NAMES, ["cat", None, "horse", "dog"])
    assert found == {"accuracy": 0.5, "mean_class_accuracy": 0.5, "classes": 3.0, "rows": 2.0}


def test_a_class_without_rows_does_not_weigh_on_the_mean() -> None:
    assert zero_shot_metrics(pictures(0, 1), CLASSES, NAMES, ["cat", "dog"])["mean_class_accuracy"] == 1.0


def test_no_row_at_all_is_zero_and_not_a_failure() -> None:
    found = zero_shot_metrics(pictures(0), CLASSES, NAMES, [None])
    assert found == {"accuracy": 0.0, "mean_class_accuracy": 0.0, "classes": 3.0, "rows": 0.0}


def test_a_model_that_always_answers_one_class_shows_in_the_mean() -> None:
    labels = ["cat"] * 8 + ["dog", "cow"]
    found = zero_shot_metrics(pictures(*[0] * 10), CLASSES, NAMES, labels)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["mean_class_accuracy"] == pytest.approx(1 / 3)
    assert majority_metrics(NAMES, labels) == found


def test_majority_by_hand() -> None:
    assert majority_metrics(NAMES, ["cat", "cat", "dog", None, "horse"]) == {
        "accuracy": pytest.approx(2 / 3),
        "mean_class_accuracy": 0.5,
        "classes": 3.0,
        "rows": 3.0,
    }
    assert majority_metrics(NAMES, [None])["accuracy"] == 0.0


def test_a_class_is_the_unit_mean_of_its_prompts_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {"cat": (1.0, 0.0), "kitten": (0.0, 1.0), "dog": (0.6, -0.8)}

    def captions(loaded: object, texts: Sequence[str], batch_size: int) -> np.ndarray:
        assert batch_size == 4
        return np.array([vectors[text] for text in texts], np.float32)

    monkeypatch.setattr(embed, "embed_captions", captions)
    found = class_embeddings(None, {"dog": ["dog"], "cat": ["cat", "kitten"]}, 4)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, [[0.6, -0.8], [2**-0.5, 2**-0.5]], atol=1e-6)
