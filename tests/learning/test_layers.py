"""Attention, hidden-state and ranking losses against plain loops, and which layers are paired."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.learning.distillation.attention import attention_loss
from mmflow.learning.distillation.hidden import hidden_loss
from mmflow.learning.distillation.loss import capture_layers, encoder_layers, pair_layers
from mmflow.learning.distillation.ranking import order_surprisal
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from tests.learning.teaching import attending
from tests.learning.tiny import alone
from tests.tiny import SMALLEST_MODEL

THERE = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])


def maps(heads: int, seed: int) -> Tensor:
    """(3, heads, 3, 3): distributions over the places that are there."""
    logits = torch.randn(3, heads, 3, 3, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(~THERE[:, None, None], -1e9).softmax(-1).requires_grad_()


def plain_attention(layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A number at a time; the heads are already paired."""
    total, count = torch.zeros(()), 0
    for ours, theirs in layers:
        for row in range(3):
            for place in range(3):
                if THERE[row, place]:
                    for head in range(ours.shape[1]):
                        for seen in range(3):
                            p, q = theirs[row, head, place, seen], ours[row, head, place, seen]
                            total = total + (p * (p / q).log() if p > 0 else 0)
                        count += 1
    return total / count


@pytest.mark.parametrize(
    ("heads", "of_student", "of_teacher"),
    [("same", [0, 1], [0, 1]), ("mean", None, None), ([(2, 1), (1, 4)], [1, 0], [0, 3])],
)
def test_attention_equals_a_plain_loop(heads: Any, of_student: Any, of_teacher: Any) -> None:
    num_teacher = 2 if heads == "same" else 4
    layers = [(maps(2, seed), maps(num_teacher, seed + 10).detach()) for seed in range(2)]
    loss = attention_loss(layers, heads, THERE, alone)
    paired = [
        (ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True))
        if heads == "mean"
        else (ours[:, of_student], theirs[:, of_teacher])
        for ours, theirs in layers
    ]
    expected = plain_attention(paired)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for (ours, _), gradient in zip(layers, torch.autograd.grad(loss, [own for own, _ in layers]), strict=True):
        expected_gradient = torch.autograd.grad(expected, ours, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
        assert (gradient[~THERE[:, None].expand(-1, 2, -1)] == 0).all()


def test_equal_maps_cost_nothing_and_a_weight_of_zero_is_finite() -> None:
    ours = maps(2, 0)
    assert attention_loss([(ours, ours.detach())], "same", THERE, alone).abs() < 1e-6
    nothing = torch.zeros_like(ours).requires_grad_()
    loss = attention_loss([(nothing, ours.detach())], "same", THERE, alone)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, nothing)[0]).all()


def test_hidden_equals_a_plain_loop() -> None:
    layers = [(torch.randn(3, 3, 4, requires_grad=True), torch.randn(3, 3, 4)) for _ in range(2)]
    loss = hidden_loss(layers, THERE, alone)
    total, count = torch.zeros(()), 0
    for ours, theirs in layers:
        for row, place in THERE.nonzero().tolist():
            for unit in range(4):
                total = total + (ours[row, place, unit] - theirs[row, place, unit]) ** 2
                count += 1
    torch.testing.assert_close(loss, total / count)
    for ours, _ in layers:
        gradient = torch.autograd.grad(loss, ours, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad(total / count, ours, retain_graph=True)[0])


def test_masks_without_places_cost_nothing() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    ours, hidden = maps(2, 0), torch.randn(3, 3, 4, requires_grad=True)
    loss = attention_loss([(ours, maps(2, 1).detach())], "same", nothing, alone)
    loss = loss + hidden_loss([(hidden, torch.randn(3, 3, 4))], nothing, alone)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (ours, hidden)))


def test_order_equals_a_plain_loop() -> None:
    student = torch.randn(4, 5, requires_grad=True)
    teacher = torch.randn(4, 5)
    there = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    surprisals = order_surprisal(student, teacher, there)
    for row in range(4):
        places = sorted(there[row].nonzero().flatten().tolist(), key=lambda place: -teacher[row, place])
        terms = [
            math.log(sum(student[row, below].exp().item() for below in places[rank:])) - student[row, place].item()
            for rank, place in enumerate(places[:-1])
        ]
        assert surprisals[row].item() == pytest.approx(sum(terms) / max(1, len(terms)), rel=1e-5, abs=1e-6)
    gradient = torch.autograd.grad(surprisals.sum(), student)[0]
    assert torch.isfinite(gradient).all()
    assert (gradient[~there] == 0).all()


def test_the_teacher_s_own_order_is_the_likeliest() -> None:
    teacher = torch.tensor([[3.0, 1.0, 2.0]])
    there = torch.ones(1, 3, dtype=torch.bool)
    costs = [
        order_surprisal(torch.tensor([scores]), teacher, there).item()
        for scores in ([30.0, 10.0, 20.0], [30.0, 20.0, 10.0], [10.0, 30.0, 20.0])
    ]
    assert costs == sorted(costs)
    assert costs[0] < 1e-3


def test_layers_are_paired() -> None:
    assert pair_layers("last", 2, 6) == [(1, 5)]
    assert pair_layers("even", 4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]  # TinyBERT's g(m) = 3m
    assert pair_layers("even", 3, 4) == [(0, 1), (1, 2), (2, 3)]
    assert pair_layers("even", 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert pair_layers([(1, 2), (2, 4)], 2, 4) == [(0, 1), (1, 3)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("fields", "widths", "places", "heads"),
    [
        (attending(layers=3), (8, 8, 8), (5, 5, 5), 2),
        (SMALLEST_MODEL, (8,), None, None),
    ],
)
def test_layers_are_described_as_they_are(
    fields: dict[str, Any], widths: tuple[int, ...], places: tuple[int, ...] | None, heads: int | None, device: str
) -> None:
    config = ModelConfig.model_validate(fields)
    with torch.device(device):
        model = build("model", config, 64, seed=0)
    model.train()
    described = encoder_layers(model.image, config.image_pixels)  # type: ignore[arg-type]
    assert described is not None
    assert (described.widths, described.num_heads) == (widths, heads)
    assert model.image.training
    if places is not None:
        assert described.num_places == places
    if device == "cpu":
        pixels = torch.randn(2, 3, config.image_pixels, config.image_pixels)
        with capture_layers(model.image.backbone, range(len(described))) as outputs:  # type: ignore[union-attr]
            model.encode_image(pixels)
        shapes = [tuple(outputs[number].shape) for number in range(len(described))]
        assert described.num_places is not None
        assert shapes == [
            (2, place, width) for place, width in zip(described.num_places, described.widths, strict=True)
        ]
        model.encode_image(pixels + 1)
        assert outputs[0] is not None  # what comes after the block is not listened to
