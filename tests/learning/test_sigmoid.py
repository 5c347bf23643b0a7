"""The sigmoid loss equals transformers' SigLIP and the paper's pseudocode, whatever is padded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmflow.learning import strips
from mmflow.learning.strips import sigmoid_loss
from tests.learning.tiny import all_real, alone, rows_of, unit

WIDTH = 6


def leaves(
    rows: int, seed: int, scale: float = 10.0, bias: float = -10.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Images, captions, scale and bias to differentiate by."""
    values = unit(rows, WIDTH, seed), unit(rows, WIDTH, seed + 1), torch.tensor([scale]), torch.tensor([bias])
    return tuple(value.to(dtype, copy=True).requires_grad_() for value in values)


def dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Algorithm 1 of the paper."""
    logits = scale.float() * image.float() @ text.float().T + bias.float()
    labels = 2 * torch.eye(len(logits)) - 1
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(logits)


@pytest.mark.parametrize("strip_elements", [1, 40, strips.STRIP_ELEMENTS])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -16.0), (2.0, 3.0)])
def test_loss_and_gradient_equal_the_paper_s(
    monkeypatch: pytest.MonkeyPatch, strip_elements: int, scale: float, bias: float
) -> None:
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", strip_elements)
    seed = torch.seed() % 2**32
    ours, theirs = leaves(11, seed, scale, bias), leaves(11, seed, scale, bias)
    loss, expected = sigmoid_loss(*ours, all_real(11), alone), dense(*theirs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6 * scale, rtol=1e-5)


def test_loss_and_gradient_equal_those_of_transformers() -> None:
    """Through the smallest SigLIP that it builds, whose own embeddings are compared."""
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 6},
        vision_config={**small, "image_size": 8, "patch_size": 4},
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-3.0)
    pixels, ids = torch.randn(5, 3, 8, 8), torch.randint(0, 20, (5, 6))
    output = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    expected = torch.autograd.grad(output.loss, [model.logit_scale, model.logit_bias])
    image, text = (
        torch.nn.functional.normalize(each, dim=-1).detach() for each in (output.image_embeds, output.text_embeds)
    )
    raw_scale = model.logit_scale.detach().reshape(1).requires_grad_()
    bias = model.logit_bias.detach().reshape(1).requires_grad_()
    loss = sigmoid_loss(image, text, raw_scale.exp(), bias, all_real(5), alone)
    found = torch.autograd.grad(loss, [raw_scale, bias])
    torch.testing.assert_close(loss, output.loss, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.squeeze(), other.squeeze(), atol=1e-5, rtol=1e-5)


def test_bf16_embeddings_lose_nothing_more_than_their_own_rounding() -> None:
    ours, theirs = (leaves(9, 3, dtype=torch.bfloat16) for _ in range(2))
    expected = dense(*theirs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_loss(*ours, all_real(9), alone)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@given(rows=st.integers(1, 10), padding=st.integers(1, 10), seed=st.integers(0, 999))
def test_padded_rows_change_nothing(rows: int, padding: int, seed: int) -> None:
    """Wherever they stand and whatever is in them."""
    places = torch.randperm(rows + padding, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    real = torch.zeros(rows + padding, dtype=torch.bool)
    real[places] = True
    plain, padded = leaves(rows, seed), leaves(rows + padding, seed + 7)
    with torch.no_grad():
        for short, long in zip(plain[:2], padded[:2], strict=True):
            long[places] = short
    expected = dense(*plain)
    loss = sigmoid_loss(*padded, rows_of(real), alone)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    expected.backward()
    loss.backward()
    for short, long in zip(plain[2:], padded[2:], strict=True):
        torch.testing.assert_close(long.grad, short.grad, atol=1e-6, rtol=1e-5)
    for short, long in zip(plain[:2], padded[:2], strict=True):
        assert long.grad is not None
        torch.testing.assert_close(long.grad[places], short.grad, atol=1e-6, rtol=1e-5)
        assert (long.grad[~real] == 0).all()


def test_the_loss_is_weighed_by_what_multiplies_it() -> None:
    """The gradient is ready before the weight is known."""
    once, thrice = leaves(4, 0), leaves(4, 0)
    sigmoid_loss(*once, all_real(4), alone).backward()
    (3 * sigmoid_loss(*thrice, all_real(4), alone)).backward()
    for one, other in zip(once, thrice, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(3 * one.grad, other.grad)
