"""InfoNCE equals other people's, whatever is padded and in however many strips it is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmflow.learning import strips
from mmflow.learning.objectives.contrastive import contrastive_loss
from tests.learning.tiny import all_real, alone, rows_of, unit

WIDTH = 6
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def leaves(rows: int, seed: int, scale: float = 20.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Images, captions and a logit scale to differentiate by."""
    values = unit(rows, WIDTH, seed), unit(rows, WIDTH, seed + 1), torch.tensor([scale])
    return tuple(value.to(dtype, copy=True).requires_grad_() for value in values)


def dense(image: Tensor, text: Tensor, scale: Tensor, smoothing: float = 0.0) -> Tensor:
    """The loss by the whole matrix, as CLIP's pseudocode has it."""
    logits = scale.float() * image.float() @ text.float().T
    right = torch.arange(len(logits))
    sides = (logits, logits.T)
    return 0.5 * sum(torch.nn.functional.cross_entropy(each, right, label_smoothing=smoothing) for each in sides)


@pytest.fixture(params=[1, 40, strips.STRIP_ELEMENTS], ids=["a row a strip", "some rows", "one strip"])
def strip_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", request.param)
    return request.param


@pytest.mark.usefixtures("strip_elements")
@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss_and_gradient_equal_those_of_transformers(rows: int, scale: float) -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    seed = torch.seed() % 2**32
    ours, theirs = leaves(rows, seed, scale), leaves(rows, seed, scale)
    loss = contrastive_loss(*ours, all_real(rows), alone)
    expected = image_text_contrastive_loss(theirs[2] * theirs[0] @ theirs[1].T)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6 * scale, rtol=1e-5)


@pytest.mark.usefixtures("strip_elements")
@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_label_smoothing_is_torch_s(smoothing: float) -> None:
    ours, theirs = leaves(9, 3), leaves(9, 3)
    loss, expected = contrastive_loss(*ours, all_real(9), alone, smoothing), dense(*theirs, smoothing)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_bf16_embeddings_lose_nothing_more_than_their_own_rounding() -> None:
    """The arithmetic is fp32, under autocast too."""
    ours, theirs = (leaves(9, 3, dtype=torch.bfloat16) for _ in range(2))
    expected = dense(*theirs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(*ours, all_real(9), alone)
        loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, **CLOSE)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@given(
    rows=st.integers(2, 12),
    padding=st.integers(1, 12),
    smoothing=st.sampled_from([0.0, 0.2]),
    strip_elements=st.sampled_from([20, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_padded_rows_change_nothing(rows: int, padding: int, smoothing: float, strip_elements: int, seed: int) -> None:
    """Wherever they stand and whatever is in them."""
    places = torch.randperm(rows + padding, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    real = torch.zeros(rows + padding, dtype=torch.bool)
    real[places] = True
    plain, padded = leaves(rows, seed), leaves(rows + padding, seed + 7)
    with torch.no_grad():
        for short, long in zip(plain[:2], padded[:2], strict=True):
            long[places] = short
    expected = dense(*plain, smoothing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "STRIP_ELEMENTS", strip_elements)
        loss = contrastive_loss(*padded, rows_of(real), alone, smoothing)
        loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    expected.backward()
    torch.testing.assert_close(padded[2].grad, plain[2].grad, atol=1e-6, rtol=1e-5)
    for short, long in zip(plain[:2], padded[:2], strict=True):
        assert long.grad is not None
        torch.testing.assert_close(long.grad[places], short.grad, atol=1e-6, rtol=1e-5)
        assert (long.grad[~real] == 0).all()


def test_perfect_pairs_approach_zero_and_equal_embeddings_the_logarithm_of_the_batch() -> None:
    same = torch.eye(WIDTH)
    assert contrastive_loss(same, same, torch.tensor([100.0]), all_real(WIDTH), alone) < 1e-6
    collapsed = unit(1, WIDTH, 0).repeat(8, 1)
    loss = contrastive_loss(collapsed, collapsed, torch.tensor([100.0]), all_real(8), alone)
    torch.testing.assert_close(loss, torch.tensor(8.0).log(), atol=1e-4, rtol=1e-4)


def test_far_logits_neither_overflow_nor_vanish() -> None:
    """The worst that a scale of 100 can do: every pair opposed, every other caption the same."""
    image = unit(1, WIDTH, 0).repeat(4, 1)
    loss = contrastive_loss(image, -image, torch.tensor([100.0]), all_real(4), alone)
    torch.testing.assert_close(loss, torch.tensor(4.0).log(), atol=1e-4, rtol=1e-4)
    pair = torch.eye(2)
    swapped = contrastive_loss(pair, pair.flip(0), torch.tensor([100.0]), all_real(2), alone)
    torch.testing.assert_close(swapped, torch.tensor(100.0))
