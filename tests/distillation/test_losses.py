"""Distillation losses against their equations written as plain loops; padding and agreement cost nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmflow.distillation.losses import SIDES, feature_loss, similarities, soft_label_loss
from mmflow.objectives.rows import GlobalRows, global_rows

Outputs = dict[str, Tensor]


def alone(rows: Tensor) -> Tensor:
    return rows


def rows_of(real: Tensor) -> GlobalRows:
    return global_rows(real, alone, rank=0)


def all_real(rows: int) -> GlobalRows:
    return rows_of(torch.ones(rows, dtype=torch.bool))


def outputs(rows: int, width: int, seed: int, scale: float = 10.0) -> Outputs:
    random = torch.Generator().manual_seed(seed)
    sides = {side: torch.randn(rows, width, generator=random) for side in SIDES}
    units = {side: nn.functional.normalize(value, dim=1).requires_grad_() for side, value in sides.items()}
    return units | {"logit_scale": torch.tensor([scale], requires_grad=True)}


def softened(logits: list[float], temperature: float) -> list[float]:
    """Hinton's equation 1: q_i = exp(z_i / T) / Σ_j exp(z_j / T)."""
    exponentials = [math.exp(logit / temperature) for logit in logits]
    return [each / sum(exponentials) for each in exponentials]


def plain_soft_label_loss(student: Outputs, teacher: Outputs, temperature: float) -> float:
    """T² · KL(teacher ‖ student), the mean over rows and both directions, a number at a time."""
    total, rows = 0.0, len(student[SIDES[0]])
    for here, there in (SIDES, SIDES[::-1]):
        for row in range(rows):
            logits = []
            for side in (student, teacher):
                cosines = [(side[here][row].double() @ column.double()).item() for column in side[there]]
                logits.append([side["logit_scale"].item() * cosine for cosine in cosines])
            ours, taught = (softened(each, temperature) for each in logits)
            total += sum(p * math.log(p / q) for p, q in zip(taught, ours, strict=True))
    return temperature**2 * total / (2 * rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_labels_equal_a_plain_loop(temperature: float) -> None:
    seed = torch.seed() % 2**32
    student, teacher = outputs(7, 5, seed, scale=8.0), outputs(7, 9, seed + 1, scale=12.0)
    loss = soft_label_loss(student, teacher, all_real(7), alone, temperature)
    assert loss.item() == pytest.approx(plain_soft_label_loss(student, teacher, temperature), rel=1e-4)


def test_features_equal_a_plain_loop() -> None:
    student, teacher = outputs(6, 4, 0), outputs(6, 4, 1)
    projected = {f"projected_{side}": student[side] for side in SIDES}
    distances = [
        sum((one.item() - other.item()) ** 2 for one, other in zip(student[side][row], teacher[side][row], strict=True))
        for side in SIDES
        for row in range(6)
    ]
    assert feature_loss(projected, teacher, all_real(6)).item() == pytest.approx(sum(distances) / 12, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(temperature: float) -> None:
    student, teacher = outputs(8, 5, 3), outputs(8, 5, 3)
    projected = {f"projected_{side}": student[side] for side in SIDES}
    rows = all_real(8)
    loss = soft_label_loss(student, teacher, rows, alone, temperature) + feature_loss(projected, teacher, rows)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    for name, leaf in student.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e-6, name


def test_kullback_leibler_is_from_the_teacher_to_the_student() -> None:
    """A student surer than its teacher pays more than one less sure: the other direction would turn that around."""
    teacher = outputs(8, 5, 0, scale=5.0)
    surer = teacher | {"logit_scale": torch.tensor([15.0])}
    assert soft_label_loss(surer, teacher, all_real(8), alone, 1.0) > soft_label_loss(
        teacher, surer, all_real(8), alone, 1.0
    )


def test_temperature_squared_keeps_the_size_of_the_gradient() -> None:
    sizes = []
    for temperature in (1.0, 4.0):
        student, teacher = outputs(32, 16, 0, scale=2.0), outputs(32, 16, 1, scale=2.0)
        soft_label_loss(student, teacher, all_real(32), alone, temperature).backward()
        sizes.append(float(torch.stack([student[side].grad.norm() for side in SIDES]).norm()))  # type: ignore[union-attr]
    assert 0.7 < sizes[1] / sizes[0] < 1.4  # without the square it would be a sixteenth


@given(rows=st.integers(2, 10), padding=st.integers(1, 10), seed=st.integers(0, 999))
def test_padded_rows_change_nothing(rows: int, padding: int, seed: int) -> None:
    places = torch.randperm(rows + padding, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    real = torch.zeros(rows + padding, dtype=torch.bool)
    real[places] = True
    plain = outputs(rows, 5, seed), outputs(rows, 5, seed + 1)
    padded = outputs(rows + padding, 5, seed + 2), outputs(rows + padding, 5, seed + 3)
    losses = []
    with torch.no_grad():
        for short, long in zip(plain, padded, strict=True):
            for side in SIDES:
                long[side][places] = short[side]
    for (student, teacher), where in ((plain, all_real(rows)), (padded, rows_of(real))):
        projected = {f"projected_{side}": student[side] for side in SIDES}
        loss = soft_label_loss(student, teacher, where, alone, 2.0) + feature_loss(projected, teacher, where)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-5)
    for side in SIDES:
        gradient = padded[0][side].grad
        assert gradient is not None
        torch.testing.assert_close(gradient[places], plain[0][side].grad, atol=1e-6, rtol=1e-4)
        assert (gradient[~real] == 0).all()
    torch.testing.assert_close(padded[0]["logit_scale"].grad, plain[0]["logit_scale"].grad, atol=1e-6, rtol=1e-4)


def test_a_rank_whose_rows_are_all_padding_adds_zero_and_no_nan() -> None:
    """This rank holds the last two of six rows, and they are padding; the others' rows come through `gather`."""
    student, teacher = outputs(6, 5, 0), outputs(6, 5, 1)
    rows = GlobalRows(torch.zeros(2, dtype=torch.bool), torch.arange(6) < 4, first=4)
    parts = [
        {name: value[4:] if name in SIDES else value for name, value in side.items()} for side in (student, teacher)
    ]
    others = {
        id(part[side]): whole[side] for part, whole in zip(parts, (student, teacher), strict=True) for side in SIDES
    }
    loss = soft_label_loss(*parts, rows, lambda local: others[id(local)], 2.0)
    loss = loss + feature_loss({f"projected_{side}": parts[0][side] for side in SIDES}, parts[1], rows)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in student.values() if leaf.grad is not None)
    assert student["logit_scale"].grad is not None


def test_columns_of_padding_get_no_probability() -> None:
    real = torch.tensor([True, False, True])
    logits = similarities(torch.randn(3, 6), torch.randn(3, 6), torch.tensor([5.0]), real)
    assert torch.isfinite(logits).all()
    assert (logits.softmax(dim=-1)[:, 1] == 0).all()
