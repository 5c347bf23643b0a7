"""The optimizer's settings: who decays, and how the learning rate goes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmflow.training.config import OptimizerConfig
from mmflow.training.engine import learning_rate_schedule, parameter_groups


def test_matrices_decay_and_norms_biases_and_scales_do_not() -> None:
    module = nn.ModuleDict(
        {"linear": nn.Linear(3, 2), "kernel": nn.Conv2d(1, 1, 2), "norm": nn.LayerNorm(2), "frozen": nn.Linear(1, 1)}
    )
    module.register_parameter("logit_scale", nn.Parameter(torch.zeros(1)))
    module["frozen"].requires_grad_(False)
    decayed, others = parameter_groups(module, 0.01, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert (decayed["lr"], others["lr"]) == (0.01, 0.01)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(each)] for each in decayed["params"]} == {"linear.weight", "kernel.weight"}
    assert {names[id(each)] for each in others["params"]} == {
        "linear.bias",
        "kernel.bias",
        "norm.weight",
        "norm.bias",
        "logit_scale",
    }


def test_schedule_by_hand() -> None:
    factor = learning_rate_schedule(
        OptimizerConfig(learning_rate=0.01, final_learning_rate=0.001, warmup_steps=4), total_steps=12
    )
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(8) == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down the cosine
    assert factor(6) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(12) == factor(100) == pytest.approx(0.1)


@given(warmup=st.integers(0, 200), total=st.integers(1, 100))
def test_schedule_rises_to_the_peak_once_and_falls(warmup: int, total: int) -> None:
    """Also where the warm-up is longer than the training."""
    factor = learning_rate_schedule(OptimizerConfig(learning_rate=0.01, warmup_steps=warmup), total)
    factors = [factor(step) for step in range(total)]
    peak = factors.index(max(factors))
    assert max(factors) == 1.0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert all(0 < each <= 1 for each in factors)
