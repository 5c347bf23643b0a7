"""The decoder sees the past and the picture, nothing else; piece by piece it says what it says of the whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmflow.core.errors import MisuseError
from mmflow.models.config import DecoderConfig
from mmflow.models.decoder import Cache, Decoder

VOCABULARY, MEMORY_WIDTH, MAX_TOKENS = 17, 6, 12


def tiny_decoder(seed: int = 0, dropout: float = 0.0) -> Decoder:
    torch.manual_seed(seed)
    config = DecoderConfig(width=16, layers=2, heads=2, dropout=dropout)
    decoder = Decoder(config, memory_width=MEMORY_WIDTH, vocabulary_size=VOCABULARY, max_tokens=MAX_TOKENS)
    with torch.no_grad():  # larger than at birth, so that attention and positions weigh in the outcome
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder.eval()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    regions=st.integers(1, 5),
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda pieces: sum(pieces) <= MAX_TOKENS),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_text_read_in_pieces_gives_what_the_whole_gives(
    rows: int, regions: int, pieces: list[int], masked: bool, seed: int
) -> None:
    decoder = tiny_decoder(seed)
    tokens = torch.randint(VOCABULARY, (rows, sum(pieces)))
    memory = torch.randn(rows, regions, MEMORY_WIDTH)
    mask = torch.rand(rows, regions) < 0.6 if masked else None
    whole = decoder(tokens, memory, mask)
    cache = Cache()
    read = torch.cat([decoder(piece, memory, mask, cache) for piece in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(read, whole, atol=1e-5, rtol=1e-5)
    assert cache.num_tokens == sum(pieces)


def test_no_token_sees_what_comes_after_it() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (2, 8)), torch.randn(2, 3, MEMORY_WIDTH)
    before = decoder(tokens, memory)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    after = decoder(changed, memory)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-4


def test_the_picture_is_read_where_its_mask_is_true() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (1, 4)), torch.randn(1, 3, MEMORY_WIDTH)
    mask = torch.tensor([[True, False, True]])
    before = decoder(tokens, memory, mask)
    elsewhere, there = memory.clone(), memory.clone()
    elsewhere[:, 1] += torch.randn(MEMORY_WIDTH)
    there[:, 0] += torch.randn(MEMORY_WIDTH)
    torch.testing.assert_close(decoder(tokens, elsewhere, mask), before)
    assert (decoder(tokens, there, mask) - before).abs().max() > 1e-4
    torch.testing.assert_close(decoder(tokens, memory[:, [0, 2]]), before)


def test_a_row_without_a_picture_is_finite_forwards_and_backwards_and_reads_nothing() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (2, 4)), torch.randn(2, 3, MEMORY_WIDTH)
    mask = torch.tensor([[False, False, False], [True, True, True]])
    logits = decoder(tokens, memory, mask)
    torch.testing.assert_close(decoder(tokens, memory + 1.0, mask)[0], logits[0])
    logits.square().sum().backward()
    assert all(
        bool(parameter.grad.isfinite().all()) for parameter in decoder.parameters() if parameter.grad is not None
    )


def test_one_table_is_looked_up_and_read_out() -> None:
    decoder = tiny_decoder()
    assert sum(VOCABULARY in parameter.shape for parameter in decoder.parameters()) == 1
    vectors = torch.randn(2, 3, 16)
    torch.testing.assert_close(decoder.vocabulary(vectors), vectors @ decoder.vocabulary.weight.T)
    tokens = torch.tensor([[3, 5]])
    torch.testing.assert_close(decoder.vocabulary(tokens), decoder.vocabulary.weight[tokens])


def test_rows_of_a_cache_can_be_repeated_and_exchanged() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (3, 5)), torch.randn(3, 2, MEMORY_WIDTH)
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    cache, rows = Cache(), torch.tensor([2, 0, 2, 1])
    decoder(tokens[:, :4], memory, mask, cache)
    cache.take(rows)
    found = decoder(tokens[rows, 4:], memory[rows], None, cache)
    torch.testing.assert_close(found, decoder(tokens, memory, mask)[rows, 4:], atol=1e-5, rtol=1e-5)


def test_more_tokens_than_positions_are_refused_with_the_recipes_key() -> None:
    decoder = tiny_decoder()
    memory, cache = torch.randn(1, 2, MEMORY_WIDTH), Cache()
    decoder(torch.zeros(1, MAX_TOKENS, dtype=torch.int64), memory, None, cache)
    with pytest.raises(MisuseError, match=r"13 tokens .* model\.max_tokens"):
        decoder(torch.zeros(1, 1, dtype=torch.int64), memory, None, cache)


def test_dropout_acts_in_training_alone() -> None:
    decoder = tiny_decoder(dropout=0.3)
    tokens, memory = torch.randint(VOCABULARY, (2, 6)), torch.randn(2, 3, MEMORY_WIDTH)
    torch.testing.assert_close(decoder(tokens, memory), decoder(tokens, memory))
    decoder.train()
    assert (decoder(tokens, memory) - decoder(tokens, memory)).abs().max() > 1e-3


def test_width_has_to_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 4"):
        DecoderConfig(width=10, heads=4)
