"""Each optimizer against its reference, on whole parameters, and the schedules; `test_sharded` has them under ZeRO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from mmflow.training.config import OptimizerConfig
from mmflow.training.optimizers import (
    AVERAGE,
    Lamb,
    Muon,
    build_optimizer,
    keep_average,
    learning_rate_schedule,
    orthogonal,
)

STEPS, RATE, DECAY, BETAS = 5, 0.02, 0.1, (0.9, 0.98)


def parameters() -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random)) for shape in [(6, 4), (3, 8), (5, 5)]]


def train(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> list[Tensor]:
    """A few steps down gradients that do not depend on what was learnt; the parameters after them."""
    random = torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for _ in range(STEPS):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
        schedule.step()
    return [parameter.detach().clone() for parameter in trained]


def group(trained: list[nn.Parameter], **more: Any) -> dict[str, Any]:
    return {"params": trained, "lr": RATE, "weight_decay": DECAY, **more}


def test_adamw_is_torch_s() -> None:
    config = OptimizerConfig(learning_rate=RATE, beta2=BETAS[1])
    actual = train(build_optimizer([group(mine := parameters())], config), mine)
    theirs = parameters()
    expected = train(torch.optim.AdamW(theirs, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True), theirs)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_muon_is_torch_s_for_matrices_of_hidden_layers() -> None:
    mine, theirs = parameters(), parameters()
    actual = train(Muon([group(mine, muon=True)], RATE, BETAS), mine)
    reference = torch.optim.Muon(theirs, lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    expected = train(reference, theirs)
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "decay", "more"), [(Muon, DECAY, {"muon": False}), (Lamb, 0.0, {})], ids=["muon", "lamb"]
)
def test_muon_for_other_parameters_and_lamb_without_decay_are_adamw(optimizer: Any, decay: float, more: Any) -> None:
    mine, theirs = parameters(), parameters()
    actual = train(optimizer([group(mine, **more) | {"weight_decay": decay}], RATE, BETAS), mine)
    expected = train(torch.optim.AdamW(theirs, lr=RATE, betas=BETAS, weight_decay=decay), theirs)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_orthogonal_brings_singular_values_near_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrix).float())
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_lamb_is_the_paper_s_algorithm_in_plain_loops() -> None:
    mine, theirs = parameters(), [parameter.detach().double() for parameter in parameters()]
    actual = train(Lamb([group(mine)], RATE, BETAS), mine)
    random = torch.Generator().manual_seed(1)
    means, squares = ([torch.zeros_like(parameter) for parameter in theirs] for _ in range(2))
    for step in range(1, STEPS + 1):
        rate = RATE * (1 - (step - 1) / 10)
        for number, x in enumerate(theirs):
            g = torch.randn(x.shape, generator=random).double()
            means[number] = BETAS[0] * means[number] + (1 - BETAS[0]) * g
            squares[number] = BETAS[1] * squares[number] + (1 - BETAS[1]) * g**2
            m = means[number] / (1 - BETAS[0] ** step)
            v = squares[number] / (1 - BETAS[1] ** step)
            r = m / (v.sqrt() + 1e-8) + DECAY * x
            theirs[number] = x - rate * (x.norm() / r.norm()) * r
    for updated, expected in zip(actual, theirs, strict=True):
        torch.testing.assert_close(updated.double(), expected, rtol=0, atol=1e-5)


def test_lamb_moves_weights_of_length_zero() -> None:
    zero = [nn.Parameter(torch.zeros(3, 3))]
    moved = train(Lamb([group(zero)], RATE, BETAS), zero)[0]
    assert moved.isfinite().all()
    assert (moved != 0).all()


def test_average_by_hand() -> None:
    trained = [nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.5)
    keep_average(optimizer, decay=0.3)
    expected = None
    for step in range(6):
        trained[0].grad = torch.full((2,), -1.0)
        optimizer.step()
        now = trained[0][0].item()
        share = min(0.3, (1 + step) / (10 + step))
        expected = now if expected is None else share * expected + (1 - share) * now
    assert expected is not None
    assert optimizer.state[trained[0]][AVERAGE].tolist() == pytest.approx([expected] * 2)
    assert not math.isclose(expected, now)


def test_average_continues_from_a_saved_state() -> None:
    def averages(stop: int) -> Tensor:
        """Six steps, the optimizer made anew after `stop` of them."""
        trained = [nn.Parameter(torch.zeros(3))]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        keep_average(optimizer, decay=0.9)
        for step in range(6):
            if step == stop:
                state = optimizer.state_dict()
                optimizer = torch.optim.AdamW(trained, lr=0.1)
                keep_average(optimizer, decay=0.9)
                optimizer.load_state_dict(state)
            trained[0].grad = torch.randn(3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return optimizer.state[trained[0]][AVERAGE]  # type: ignore[no-any-return]

    assert torch.equal(averages(stop=3), averages(stop=6))


# --- learning-rate schedules ----------------------------------------------------------------------------------------


def schedule(total_steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(learning_rate=0.01, **settings)
    factor = learning_rate_schedule(config, total_steps)
    return [factor(step) for step in range(total_steps + 3)]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_cosine_and_linear_warm_up_and_fall_to_the_final_rate(kind: str) -> None:
    factors = schedule(12, final_learning_rate=0.001, warmup_steps=4, schedule=kind)
    shares = [0.5 * (1 + math.cos(math.pi * step / 8)) if kind == "cosine" else 1 - step / 8 for step in range(9)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:13] == pytest.approx([0.1 + 0.9 * share for share in shares])
    assert factors[12:] == pytest.approx([0.1] * 3)


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
    assert all(0 < factor <= 1 for factor in factors)


def test_only_wsd_has_a_decay_share() -> None:
    with pytest.raises(ValidationError, match="schedule cosine does not use it; set schedule to wsd"):
        OptimizerConfig(decay_share=0.1)
