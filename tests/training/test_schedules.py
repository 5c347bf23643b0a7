"""How the learning rate goes, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmflow.training.config import OptimizerConfig
from mmflow.training.optimizers import learning_rate_schedule


def schedule(total_steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(learning_rate=0.01, **settings)
    factor = learning_rate_schedule(config, total_steps)
    return [factor(step) for step in range(total_steps + 3)]


def test_cosine() -> None:
    factors = schedule(12, final_learning_rate=0.001, warmup_steps=4)
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down
    assert factors[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[12:] == pytest.approx([0.1] * 3)


def test_linear() -> None:
    factors = schedule(12, final_learning_rate=0.002, warmup_steps=4, schedule="linear")
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:13] == pytest.approx([1.0 - 0.8 * step / 8 for step in range(9)])
    assert factors[12:] == pytest.approx([0.2] * 3)


def test_wsd_is_level_until_its_last_steps() -> None:
    factors = schedule(20, final_learning_rate=0.001, warmup_steps=4, schedule="wsd")
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:17] == [1.0] * 13  # a fifth of 20 is 4
    assert factors[17:21] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(step / 4)) for step in range(1, 5)])
    assert schedule(20, warmup_steps=0, schedule="wsd", decay_share=0.5)[:11] == [1.0] * 11
    assert schedule(20, warmup_steps=0, schedule="wsd", decay_share=0.5)[15] == pytest.approx(1 - math.sqrt(0.5))
    all_of_it = schedule(20, warmup_steps=5, schedule="wsd", decay_share=1.0)
    assert all_of_it[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all_of_it[6] == pytest.approx(1 - math.sqrt(1 / 15))


@given(warmup=st.integers(0, 200), total=st.integers(1, 100), kind=st.sampled_from(["cosine", "linear", "wsd"]))
def test_every_schedule_rises_to_the_peak_once_and_falls(warmup: int, total: int, kind: str) -> None:
    """Also where the warm-up is longer than the training."""
    factors = schedule(total, warmup_steps=warmup, schedule=kind)[:total]
    peak = factors.index(max(factors))
    assert max(factors) == 1.0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert all(0 < each <= 1 for each in factors)


def test_only_wsd_has_a_decay_share() -> None:
    with pytest.raises(ValidationError, match="schedule cosine does not use it; set schedule to wsd"):
        OptimizerConfig(decay_share=0.1)
