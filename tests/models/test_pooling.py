"""Each pooling against a plain loop over rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmflow.models.attention import AttentionPooling, pool_eos, pool_last, pool_mean

EOS = 3


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence, its mask (real tokens first, at least one a row) and its ids."""
    length = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, length), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sequence = torch.randn(len(lengths), length, 3, generator=generator)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return sequence, mask, torch.randint(0, 6, (len(lengths), length), generator=generator)


@given(batches())
def test_poolings_equal_a_loop_over_rows(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    sequence, mask, ids = batch
    mean, last, eos = pool_mean(sequence, mask), pool_last(sequence, mask), pool_eos(sequence, mask, ids, EOS)
    for row, (vectors, real, words) in enumerate(zip(sequence, mask, ids, strict=True)):
        length = int(real.sum())
        torch.testing.assert_close(mean[row], vectors[:length].mean(0))
        assert torch.equal(last[row], vectors[length - 1])
        closing = [place for place in range(length) if words[place] == EOS] or [length - 1]
        assert torch.equal(eos[row], vectors[closing[0]])
    assert torch.equal(pool_eos(sequence, mask, ids, None), last)


def test_the_mean_of_no_token_is_zero() -> None:
    assert torch.equal(pool_mean(torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool)), torch.zeros(1, 3))


@pytest.mark.parametrize("width", [8, 128])
def test_attention_pooling_equals_its_equation_on_real_tokens(width: int) -> None:
    """softmax(q kᵀ / √d) v written out, head by head."""
    pooling = AttentionPooling(width)
    heads = 2 if width == 128 else 1
    sequence, mask = torch.randn(3, 6, width), torch.arange(6) < torch.tensor([[2], [6], [1]])
    attention = pooling.attention
    expected = []
    for vectors, real in zip(sequence, mask, strict=True):
        query, keys, values = (
            attention.query(pooling.query[0]),
            *(project(vectors[real]) for project in (attention.key, attention.value)),
        )
        read = [
            ((q @ k.T) * q.shape[-1] ** -0.5).softmax(-1) @ v
            for q, k, v in zip(query.chunk(heads, 1), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True)
        ]
        expected.append(pooling.norm(attention.output(torch.cat(read, 1)))[0])
    pooled, weights = pooling(sequence, mask)
    torch.testing.assert_close(pooled, torch.stack(expected))
    assert weights is None
    pooled, weights = pooling(sequence, mask, maps=True)
    torch.testing.assert_close(pooled, torch.stack(expected))
    assert weights.shape == (3, heads, 1, 6)
    assert torch.equal(weights > 0, mask[:, None, None].expand_as(weights))
