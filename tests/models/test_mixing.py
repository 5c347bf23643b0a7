"""Concatenation and gated fusion against their equations, a unit at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.fusions import WIDTH, encodings, fusion


def mixed_by_loop(kind: str, mix: Any, text: Tensor, image: Tensor) -> Tensor:
    """One pair of vectors, a unit at a time."""
    both = [*text.tolist(), *image.tolist()]
    units = []
    for unit in range(WIDTH):
        if kind == "gated":  # arXiv 1702.01992, section 3.1
            hidden = [
                math.tanh(sum(w * x for w, x in zip(side.weight[unit].tolist(), vector.tolist(), strict=True)))
                for side, vector in ((mix.text, text), (mix.image, image))
            ]
            gates = [
                1 / (1 + math.exp(-sum(w * x for w, x in zip(mix.gates.weight[row].tolist(), both, strict=True))))
                for row in (unit, WIDTH + unit)
            ]
            units.append(sum(gate * value for gate, value in zip(gates, hidden, strict=True)))
        else:
            x = (
                sum(w * x for w, x in zip(mix.inner.weight[unit].tolist(), both, strict=True))
                + mix.inner.bias[unit].item()
            )
            units.append(0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    if kind == "gated":
        return torch.tensor(units)
    mean = sum(units) / WIDTH
    deviation = math.sqrt(sum((unit - mean) ** 2 for unit in units) / WIDTH + mix.norm.eps)
    scaled = [(unit - mean) / deviation for unit in units]
    return torch.tensor(scaled) * mix.norm.weight.detach() + mix.norm.bias.detach()


@pytest.mark.parametrize("kind", ["concatenation", "gated"])
def test_mixing_is_its_equation_by_loops(kind: str) -> None:
    made, (image, text) = fusion(kind), encodings()
    with torch.no_grad():
        fused = made(image, text)
    for row in range(4):
        torch.testing.assert_close(
            fused.pooled_BW[row],
            mixed_by_loop(kind, made.mix, text.pooled_BW[row], image.pooled_BW[row]),
            atol=1e-5,
            rtol=1e-5,
        )
    token, region = text.sequence_BTW[1, 2], image.sequence_BTW[1, 3]
    expected = mixed_by_loop(kind, made.mix, token, image.pooled_BW[1])
    torch.testing.assert_close(fused.text_BTW[1, 2], expected, atol=1e-5, rtol=1e-5)
    expected = mixed_by_loop(kind, made.mix, text.pooled_BW[1], region)
    torch.testing.assert_close(fused.image_BRW[1, 3], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["concatenation", "gated"])
def test_mixing_has_the_gradient_of_finite_differences(kind: str) -> None:
    made = fusion(kind, frozenset({"pooled"})).double()
    (image, text) = encodings(batch=2)
    text_BM, image_BM = text.pooled_BW.double().requires_grad_(), image.pooled_BW.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, i: made.mix(t[:, None], i[:, None]), (text_BM, image_BM))
