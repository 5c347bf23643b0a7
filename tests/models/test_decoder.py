"""The decoder reads only earlier tokens and the image; searches equal plain ones over a vocabulary small enough to
list every text."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmflow.core.errors import MisuseError
from mmflow.models.config import DecoderConfig
from mmflow.models.decoder import Cache, Decoder, DecoderTokens, beam, greedy, nucleus
from mmflow.models.encoders import Encoded

VOCABULARY, MEMORY_WIDTH, MAX_TOKENS = 17, 6, 12


def tiny_decoder(
    seed: int = 0, dropout: float = 0.0, vocabulary: int = VOCABULARY, max_tokens: int = MAX_TOKENS, spread: float = 0.2
) -> Decoder:
    """With weights spread wider than fresh ones, so that attention and positions matter to the outcome."""
    torch.manual_seed(seed)
    config = DecoderConfig(width=16, layers=2, heads=2, dropout=dropout)
    decoder = Decoder(config, memory_width=MEMORY_WIDTH, vocabulary_size=vocabulary, max_tokens=max_tokens)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return decoder.eval()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    regions=st.integers(1, 5),
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda pieces: sum(pieces) <= MAX_TOKENS),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_text_read_in_pieces_equals_one_call(
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


def test_no_token_reads_later_tokens() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (2, 8)), torch.randn(2, 3, MEMORY_WIDTH)
    before = decoder(tokens, memory)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    after = decoder(changed, memory)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-4


def test_the_image_is_read_where_its_mask_is_true() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (1, 4)), torch.randn(1, 3, MEMORY_WIDTH)
    mask = torch.tensor([[True, False, True]])
    before = decoder(tokens, memory, mask)
    outside, inside = memory.clone(), memory.clone()
    outside[:, 1] += torch.randn(MEMORY_WIDTH)
    inside[:, 0] += torch.randn(MEMORY_WIDTH)
    torch.testing.assert_close(decoder(tokens, outside, mask), before)
    assert (decoder(tokens, inside, mask) - before).abs().max() > 1e-4
    torch.testing.assert_close(decoder(tokens, memory[:, [0, 2]]), before)


def test_a_row_without_an_image_is_finite_and_reads_nothing() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (2, 4)), torch.randn(2, 3, MEMORY_WIDTH)
    mask = torch.tensor([[False, False, False], [True, True, True]])
    logits = decoder(tokens, memory, mask)
    torch.testing.assert_close(decoder(tokens, memory + 1.0, mask)[0], logits[0])
    logits.square().sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in decoder.parameters())


def test_tokens_are_looked_up_and_predicted_with_one_table() -> None:
    decoder = tiny_decoder()
    assert sum(VOCABULARY in parameter.shape for parameter in decoder.parameters()) == 1
    vectors, tokens = torch.randn(2, 3, 16), torch.tensor([[3, 5]])
    torch.testing.assert_close(decoder.vocabulary(vectors), vectors @ decoder.vocabulary.weight.T)
    torch.testing.assert_close(decoder.vocabulary(tokens), decoder.vocabulary.weight[tokens])


def test_rows_of_a_cache_can_be_repeated_and_reordered() -> None:
    decoder = tiny_decoder()
    tokens, memory = torch.randint(VOCABULARY, (3, 5)), torch.randn(3, 2, MEMORY_WIDTH)
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    cache, rows = Cache(), torch.tensor([2, 0, 2, 1])
    decoder(tokens[:, :4], memory, mask, cache)
    cache.take(rows)
    last = decoder(tokens[rows, 4:], memory[rows], None, cache)
    torch.testing.assert_close(last, decoder(tokens, memory, mask)[rows, 4:], atol=1e-5, rtol=1e-5)


def test_more_tokens_than_positions_are_refused() -> None:
    decoder, memory, cache = tiny_decoder(), torch.randn(1, 2, MEMORY_WIDTH), Cache()
    decoder(torch.zeros(1, MAX_TOKENS, dtype=torch.int64), memory, None, cache)
    with pytest.raises(MisuseError, match=r"13 tokens .* model\.max_tokens"):
        decoder(torch.zeros(1, 1, dtype=torch.int64), memory, None, cache)


def test_dropout_only_acts_in_training() -> None:
    decoder = tiny_decoder(dropout=0.3)
    tokens, memory = torch.randint(VOCABULARY, (2, 6)), torch.randn(2, 3, MEMORY_WIDTH)
    torch.testing.assert_close(decoder(tokens, memory), decoder(tokens, memory))
    decoder.train()
    assert (decoder(tokens, memory) - decoder(tokens, memory)).abs().max() > 1e-3


# --- searches ---------------------------------------------------------------------------------------------------------

PAD, FIRST, LAST = 0, 1, 2
TOKENS = DecoderTokens(FIRST, LAST, PAD)
WORDS = (3, 4)


def writer(seed: int) -> Decoder:
    """With odds far from even, or every search would find the shortest text."""
    return tiny_decoder(seed, vocabulary=5, max_tokens=6, spread=0.6)


def memory_of(rows: int, masked: bool = False) -> Encoded:
    sequence = torch.randn(rows, 3, MEMORY_WIDTH)
    return Encoded(sequence, sequence.mean(1), torch.tensor([[True, True, False]] * rows) if masked else None)


def row_of(memory: Encoded, row: int) -> Encoded:
    return Encoded(*(None if tensor is None else tensor[row, None] for tensor in memory))


@torch.no_grad()
def log_probabilities(decoder: Decoder, memory: Encoded, text: tuple[int, ...] | list[int]) -> Tensor:
    """(T + 1, V): of the token after each of a text's, for a memory of one row, without the cache."""
    logits = decoder(torch.tensor([[FIRST, *text]]), memory.sequence_BTW, memory.mask_BT)[0]
    return logits.log_softmax(-1)


def log_probability(decoder: Decoder, memory: Encoded, text: tuple[int, ...]) -> float:
    steps = log_probabilities(decoder, memory, text[:-1])
    return float(sum(steps[place, token] for place, token in enumerate(text)))


def first_token(decoder: Decoder, memory: Encoded) -> Tensor:
    """(V,): its probabilities without padding and the opening token."""
    steps = log_probabilities(decoder, row_of(memory, 0), ())[0]
    steps[[PAD, FIRST]] = -torch.inf
    return steps.softmax(-1)


def all_texts(max_tokens: int) -> list[tuple[int, ...]]:
    """Every text that closes within `max_tokens`, and every one of that length that does not."""
    closed = [(*text, LAST) for length in range(max_tokens) for text in product(WORDS, repeat=length)]
    return closed + list(product(WORDS, repeat=max_tokens))


def text_of(ids: Tensor) -> tuple[int, ...]:
    return tuple(token for token in ids.tolist() if token != PAD)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), penalty=st.sampled_from([0.0, 0.7, 1.0]), masked=st.booleans())
def test_a_beam_as_wide_as_the_texts_finds_the_best_of_all(seed: int, penalty: float, masked: bool) -> None:
    decoder, max_tokens = writer(seed), 4
    memory = memory_of(3, masked)
    written = beam(decoder, memory, TOKENS, max_tokens, width=16, length_penalty=penalty)
    for row in range(3):
        alone = row_of(memory, row)
        scores = {text: log_probability(decoder, alone, text) for text in all_texts(max_tokens)}
        best = max(scores, key=lambda text: scores[text] / len(text) ** penalty)
        assert text_of(written.token_ids_BT[row]) == best
        assert float(written.log_probability_B[row]) == pytest.approx(scores[best], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_greedy_takes_the_likeliest_token_until_the_closing_one_and_equals_one_beam(seed: int) -> None:
    decoder, memory = writer(seed), memory_of(4)
    written, beamed = greedy(decoder, memory, TOKENS, 6), beam(decoder, memory, TOKENS, 6, width=1)
    assert beamed.token_ids_BT.tolist() == written.token_ids_BT.tolist()
    torch.testing.assert_close(beamed.log_probability_B, written.log_probability_B)
    for row in range(4):
        alone, text = row_of(memory, row), list[int]()
        while len(text) < 6 and LAST not in text:
            steps = log_probabilities(decoder, alone, text)[-1]
            steps[[PAD, FIRST]] = -torch.inf
            text.append(int(steps.argmax()))
        assert text_of(written.token_ids_BT[row]) == tuple(text)
        expected = log_probability(decoder, alone, tuple(text))
        assert float(written.log_probability_B[row]) == pytest.approx(expected, abs=1e-5)
        assert bool((written.token_ids_BT[row, len(text) :] == PAD).all())


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_row_is_written_in_a_batch_as_alone(search: str) -> None:
    def write(memory: Encoded) -> Tensor:
        if search == "greedy":
            return greedy(decoder, memory, TOKENS, 6).token_ids_BT
        return beam(decoder, memory, TOKENS, 6, width=3, length_penalty=1.0).token_ids_BT

    lengths = set()
    for seed in range(12):
        decoder, memory = writer(seed), memory_of(5)
        together = write(memory)
        for row in range(5):
            text = text_of(together[row])
            assert text_of(write(row_of(memory, row))[0]) == text
            lengths.add(len(text))
    assert len(lengths) > 2  # rows did end at different steps


def test_a_tiny_nucleus_is_greedy() -> None:
    decoder, memory = writer(3), memory_of(4)
    drawn = nucleus(decoder, memory, TOKENS, 6, share=1e-6, generator=seeded(0))
    assert drawn.token_ids_BT.tolist() == greedy(decoder, memory, TOKENS, 6).token_ids_BT.tolist()


def copies(count: int) -> Encoded:
    row = torch.randn(1, 3, MEMORY_WIDTH)
    return Encoded(row.expand(count, -1, -1), row[:, 0].expand(count, -1))


def test_a_full_nucleus_draws_tokens_with_the_decoders_probabilities() -> None:
    decoder, memory = writer(1), copies(20_000)
    drawn = nucleus(decoder, memory, TOKENS, 1, share=1.0, generator=seeded(5))
    frequencies = torch.bincount(drawn.token_ids_BT[:, 0], minlength=5) / 20_000
    torch.testing.assert_close(frequencies, first_token(decoder, memory), atol=0.015, rtol=0.0)


def test_tokens_outside_the_nucleus_are_never_drawn() -> None:
    decoder, memory = writer(1), copies(5_000)
    shares, order = first_token(decoder, memory).sort(descending=True)
    share = float(shares[0] + shares[1] / 2)
    drawn = nucleus(decoder, memory, TOKENS, 1, share=share, generator=seeded(5)).token_ids_BT[:, 0]
    assert set(drawn.tolist()) == {int(order[0]), int(order[1])}
    first = (drawn == order[0]).float().mean()
    assert float(first) == pytest.approx(float(shares[0] / (shares[0] + shares[1])), abs=0.03)


def test_the_same_generator_draws_the_same_text_beside_any_rows() -> None:
    decoder, memory = writer(2), memory_of(6)

    def draw(memory: Encoded, seed: int) -> list[tuple[int, ...]]:
        written = nucleus(decoder, memory, TOKENS, 6, share=0.95, generator=seeded(seed))
        return [text_of(ids) for ids in written.token_ids_BT]

    other_rows = memory._replace(sequence_BTW=torch.cat([memory.sequence_BTW[:3], torch.randn(3, 3, MEMORY_WIDTH)]))
    assert draw(memory, 7) == draw(memory, 7)
    assert draw(memory, 7) != draw(memory, 8)
    assert draw(other_rows, 7)[:3] == draw(memory, 7)[:3]


def test_one_token_may_open_and_close_texts() -> None:
    tokens = DecoderTokens(LAST, LAST, PAD)
    assert any(LAST in greedy(writer(seed), memory_of(8), tokens, 6).token_ids_BT for seed in range(10))
