"""Greedy, beam and nucleus against plain searches over a vocabulary small enough to list every text."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmflow.models.config import DecoderConfig
from mmflow.models.decoder import Decoder
from mmflow.models.generate import DecoderTokens, Memory, beam, greedy, nucleus

PAD, FIRST, LAST = 0, 1, 2
TOKENS = DecoderTokens(FIRST, LAST, PAD)
VOCABULARY = 5  # two words that text can hold


def decoder_of(seed: int, max_tokens: int = 6) -> Decoder:
    torch.manual_seed(seed)
    config = DecoderConfig(width=8, layers=1, heads=2, dropout=0.0)
    decoder = Decoder(config, memory_width=4, vocabulary_size=VOCABULARY, max_tokens=max_tokens)
    with torch.no_grad():  # far from even odds, or every search finds the shortest text
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.6)
    return decoder.eval()


def memory_of(rows: int, masked: bool = False) -> Memory:
    return Memory(torch.randn(rows, 3, 4), torch.tensor([[True, True, False]] * rows) if masked else None)


def row_of(memory: Memory, row: int) -> Memory:
    return Memory(memory.sequence_BRM[row, None], None if memory.mask_BR is None else memory.mask_BR[row, None])


@torch.no_grad()
def log_probability(decoder: Decoder, memory: Memory, text: tuple[int, ...]) -> float:
    """Of one text for a memory of one row, without the cache."""
    tokens = torch.tensor([[FIRST, *text[:-1]]])
    steps = decoder(tokens, *memory).log_softmax(-1)[0]
    return float(sum(steps[place, token] for place, token in enumerate(text)))


def all_texts(max_tokens: int) -> list[tuple[int, ...]]:
    """Every text that closes within `max_tokens`, and every one of that length that does not."""
    words = [token for token in range(VOCABULARY) if token not in (PAD, FIRST, LAST)]
    closed = [(*text, LAST) for length in range(max_tokens) for text in product(words, repeat=length)]
    return closed + list(product(words, repeat=max_tokens))


def text_of(ids: torch.Tensor) -> tuple[int, ...]:
    return tuple(token for token in ids.tolist() if token != PAD)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), penalty=st.sampled_from([0.0, 0.7, 1.0]), masked=st.booleans())
def test_a_beam_as_wide_as_the_texts_finds_the_best_of_them_all(seed: int, penalty: float, masked: bool) -> None:
    decoder, max_tokens = decoder_of(seed), 4
    memory = memory_of(3, masked)
    found = beam(decoder, memory, TOKENS, max_tokens, width=16, length_penalty=penalty)
    for row in range(3):
        alone = row_of(memory, row)
        scored = {text: log_probability(decoder, alone, text) for text in all_texts(max_tokens)}
        best = max(scored, key=lambda text: scored[text] / len(text) ** penalty)
        assert text_of(found.token_ids_BT[row]) == best
        assert float(found.log_probability_B[row]) == pytest.approx(scored[best], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_beam_is_greedy(seed: int) -> None:
    decoder, memory = decoder_of(seed), memory_of(4)
    by_beam, by_greed = beam(decoder, memory, TOKENS, 6, width=1), greedy(decoder, memory, TOKENS, 6)
    assert by_beam.token_ids_BT.tolist() == by_greed.token_ids_BT.tolist()
    torch.testing.assert_close(by_beam.log_probability_B, by_greed.log_probability_B)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_greedy_takes_the_likeliest_token_and_stops_at_the_closing_one(seed: int) -> None:
    decoder, memory = decoder_of(seed), memory_of(4)
    found = greedy(decoder, memory, TOKENS, 6)
    for row in range(4):
        alone, text = row_of(memory, row), list[int]()
        while len(text) < 6 and LAST not in text:
            with torch.no_grad():
                logits = decoder(torch.tensor([[FIRST, *text]]), *alone)[0, -1]
            logits[[PAD, FIRST]] = -torch.inf
            text.append(int(logits.argmax()))
        assert text_of(found.token_ids_BT[row]) == tuple(text)
        expected = log_probability(decoder, alone, tuple(text))
        assert float(found.log_probability_B[row]) == pytest.approx(expected, abs=1e-5)
        after = found.token_ids_BT[row, len(text) :]
        assert bool((after == PAD).all())


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_row_writes_in_a_batch_what_it_writes_alone(search: str) -> None:
    def write(memory: Memory) -> torch.Tensor:
        if search == "greedy":
            return greedy(decoder, memory, TOKENS, 6).token_ids_BT
        return beam(decoder, memory, TOKENS, 6, width=3, length_penalty=1.0).token_ids_BT

    lengths = set()
    for seed in range(12):
        decoder, memory = decoder_of(seed), memory_of(5)
        together = write(memory)
        for row in range(5):
            text = text_of(together[row])
            assert text_of(write(row_of(memory, row))[0]) == text
            lengths.add(len(text))
    assert len(lengths) > 2  # rows did end at different steps


def test_a_wider_beam_never_finds_a_worse_text_than_greedy() -> None:
    better = 0
    for seed in range(40):
        decoder, memory = decoder_of(seed), memory_of(2)
        greed = greedy(decoder, memory, TOKENS, 5).log_probability_B
        wide = beam(decoder, memory, TOKENS, 5, width=16).log_probability_B
        assert bool((wide >= greed - 1e-5).all())
        better += int((wide > greed + 1e-3).sum())
    assert better > 0


def test_a_nucleus_of_almost_nothing_is_greedy() -> None:
    decoder, memory = decoder_of(3), memory_of(4)
    drawn = nucleus(decoder, memory, TOKENS, 6, share=1e-6, generator=torch.Generator().manual_seed(0))
    assert drawn.token_ids_BT.tolist() == greedy(decoder, memory, TOKENS, 6).token_ids_BT.tolist()


def test_a_whole_nucleus_draws_tokens_as_often_as_the_decoder_says() -> None:
    decoder = decoder_of(1)
    memory = Memory(torch.randn(1, 3, 4).expand(20_000, 3, 4))
    drawn = nucleus(decoder, memory, TOKENS, 1, share=1.0, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = decoder(torch.tensor([[FIRST]]), memory.sequence_BRM[:1])[0, 0]
    logits[[PAD, FIRST]] = -torch.inf
    counted = torch.bincount(drawn.token_ids_BT[:, 0], minlength=VOCABULARY) / 20_000
    torch.testing.assert_close(counted, logits.softmax(-1), atol=0.015, rtol=0.0)


def test_what_is_outside_the_nucleus_is_never_drawn() -> None:
    decoder = decoder_of(1)
    memory = Memory(torch.randn(1, 3, 4).expand(5_000, 3, 4))
    with torch.no_grad():
        logits = decoder(torch.tensor([[FIRST]]), memory.sequence_BRM[:1])[0, 0]
    logits[[PAD, FIRST]] = -torch.inf
    share, order = logits.softmax(-1).sort(descending=True)
    drawn = nucleus(
        decoder, memory, TOKENS, 1, share=float(share[0] + share[1] / 2), generator=torch.Generator().manual_seed(5)
    )
    assert set(drawn.token_ids_BT[:, 0].tolist()) == {int(order[0]), int(order[1])}
    first = (drawn.token_ids_BT[:, 0] == order[0]).float().mean()
    assert float(first) == pytest.approx(float(share[0] / (share[0] + share[1])), abs=0.03)


def test_the_same_generator_draws_the_same_text_whatever_other_rows_write() -> None:
    decoder, memory = decoder_of(2), memory_of(6)

    def draw(memory: Memory, seed: int) -> list[list[int]]:
        found = nucleus(decoder, memory, TOKENS, 6, share=0.95, generator=torch.Generator().manual_seed(seed))
        return [list(text_of(ids)) for ids in found.token_ids_BT]

    others = Memory(torch.cat([memory.sequence_BRM[:3], torch.randn(3, 3, 4)]))
    assert draw(memory, 7) == draw(memory, 7)
    assert draw(memory, 7) != draw(memory, 8)
    assert draw(others, 7)[:3] == draw(memory, 7)[:3]


def test_one_mark_may_both_open_and_close() -> None:
    decoder, memory = decoder_of(4), memory_of(8)
    found = greedy(decoder, memory, DecoderTokens(LAST, LAST, PAD), 6)
    assert LAST in found.token_ids_BT
