"""Text from a decoder: greedy, beam search and nucleus sampling, for all rows of a batch at once, with its cache.

Each function writes what follows the opening token, up to and including the closing one, and pads finished rows. It
never writes padding or the opening token: no target contains them, and a row with one would look like a short row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.loading.tokens import special_tokens
from mmflow.models.decoder import Cache, Decoder
from mmflow.models.encoders import Encoded

# Shapes: B batch, K beams, T tokens written, V vocabulary. `memory` is the encoding that the decoder reads.


class DecoderTokens(NamedTuple):
    """The tokenizer's ids of the opening token, the closing token and padding."""

    first: int
    last: int
    pad: int


class Written(NamedTuple):
    """Token ids (B, T) of int64 without the opening token, and their log-probability (B,) by the decoder."""

    token_ids_BT: Tensor
    log_probability_B: Tensor


Choice = Callable[[Tensor, int], Tensor]  # (log-probabilities (B, V), number of the step) → token ids (B,)


def decoder_tokens(key: str, tokenizer: Tokenizer) -> DecoderTokens:
    """The tokens that open, close and pad a decoder's texts. `key` is the recipe's key of the model, for errors.

    Raises RecipeError if the tokenizer does not open and close every text: a decoder that never saw these tokens in
    training would not know how to start or when to stop.
    """
    special = special_tokens(tokenizer)
    ids = tokenizer.encode("a").ids
    if special.first is None or special.last is None or (ids[0], ids[-1]) != (special.first, special.last):
        raise RecipeError(
            f"{key}.decoder: the tokenizer does not put a token before and after each text, which a decoder needs to "
            "start and stop; use one that does"
        )
    return DecoderTokens(special.first, special.last, special.pad)


@torch.inference_mode()
def greedy(decoder: Decoder, memory: Encoded, tokens: DecoderTokens, max_tokens: int) -> Written:
    """The likeliest token at every step."""
    return _one_by_one(decoder, memory, tokens, max_tokens, lambda log_BV, _: log_BV.argmax(-1))


@torch.inference_mode()
def nucleus(
    decoder: Decoder, memory: Encoded, tokens: DecoderTokens, max_tokens: int, share: float, generator: torch.Generator
) -> Written:
    """Each token drawn from the smallest set with `share` (0 to 1) of the probability (arXiv 1904.09751, section 3.1).

    All random numbers are drawn first, one for each row and step, so that a row's text does not depend on the length of
    the other rows.
    """
    rows, device = len(memory.sequence_BTW), memory.sequence_BTW.device
    drawn_BT = torch.rand(rows, max_tokens, generator=generator, dtype=torch.float64, device=generator.device)

    def choose(log_BV: Tensor, step: int) -> Tensor:
        probability_BV, ids_BV = log_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulative_BV = probability_BV.cumsum(-1)
        # A token is in the nucleus if the likelier ones do not reach the share; the first always is.
        num_kept_B1 = (cumulative_BV - probability_BV < share).sum(-1, keepdim=True)
        drawn_B1 = drawn_BT[:, step, None].to(device) * cumulative_BV.gather(1, num_kept_B1 - 1)
        place_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True).minimum(num_kept_B1 - 1)
        return ids_BV.gather(1, place_B1).squeeze(1)

    return _one_by_one(decoder, memory, tokens, max_tokens, choose)


def _one_by_one(decoder: Decoder, memory: Encoded, tokens: DecoderTokens, max_tokens: int, choose: Choice) -> Written:
    rows, device = len(memory.sequence_BTW), memory.sequence_BTW.device
    cache = Cache()
    token_B = torch.full((rows,), tokens.first, dtype=torch.int64, device=device)
    done_B = torch.zeros(rows, dtype=torch.bool, device=device)
    total_B = torch.zeros(rows, device=device)
    written: list[Tensor] = []
    for step in range(max_tokens):
        log_BV = _next(decoder, token_B, memory, cache, tokens)
        chosen_B = choose(log_BV, step)
        total_B = total_B + log_BV.gather(1, chosen_B[:, None]).squeeze(1).masked_fill(done_B, 0.0)
        token_B = chosen_B.masked_fill(done_B, tokens.pad)
        written.append(token_B)
        done_B = done_B | (chosen_B == tokens.last)
        if bool(done_B.all()):
            break
    return Written(torch.stack(written, 1), total_B)


@torch.inference_mode()
def beam(
    decoder: Decoder, memory: Encoded, tokens: DecoderTokens, max_tokens: int, width: int, length_penalty: float = 0.0
) -> Written:
    """The text with the best log-probability / length ** `length_penalty` among those that `width` beams reach.

    The penalty is 0 or more; above 0 it favours longer text. The length includes the closing token. A row ends when no
    beam can still beat its best text, so it loses nothing by ending. Text that has not closed by `max_tokens` counts as
    it is. With as many beams as there are texts this is exhaustive search, with one beam it is greedy.
    """
    rows, device = len(memory.sequence_BTW), memory.sequence_BTW.device
    cache = Cache()
    row_B = torch.arange(rows, device=device)
    live_BK = torch.full((rows, width), -torch.inf, device=device)
    live_BK[:, 0] = 0.0  # all beams are still the same text: only one continues, or the others would be its copies
    ids_BKT = torch.full((rows, width, max_tokens), tokens.pad, dtype=torch.int64, device=device)
    best = _Best(torch.full((rows,), -torch.inf, device=device), live_BK[:, 0], ids_BKT[:, 0])
    token = torch.full((rows * width,), tokens.first, dtype=torch.int64, device=device)
    mask = None if memory.mask_BT is None else memory.mask_BT.repeat_interleave(width, 0)
    memory = memory._replace(sequence_BTW=memory.sequence_BTW.repeat_interleave(width, 0), mask_BT=mask)
    for step in range(max_tokens):
        log_BKV = _next(decoder, token, memory, cache, tokens).view(rows, width, -1)
        total_BKV = live_BK[..., None] + log_BKV
        # A closed text counts if it is among the best `width` of all candidates.
        worst_B1 = total_BKV.flatten(1).topk(width).values[:, -1:]
        closed_BK = total_BKV[..., tokens.last]
        closed_B, beam_B = closed_BK.masked_fill(closed_BK < worst_B1, -torch.inf).max(1)
        closed_ids_BT = ids_BKT[row_B, beam_B].clone()
        closed_ids_BT[:, step] = tokens.last
        best = best.or_better(closed_B / (step + 1) ** length_penalty, closed_B, closed_ids_BT)
        total_BKV[..., tokens.last] = -torch.inf
        live_BK, place_BK = total_BKV.flatten(1).topk(width)
        beams_BK = place_BK // total_BKV.shape[-1]
        ids_BKT = ids_BKT[row_B[:, None], beams_BK]
        ids_BKT[..., step] = place_BK % total_BKV.shape[-1]
        # Log-probabilities only fall, so a beam's final score is at most its current one over the greatest length.
        done_B = best.score_B >= live_BK[:, 0] / max_tokens**length_penalty
        live_BK = live_BK.masked_fill(done_B[:, None], -torch.inf)
        if bool(done_B.all()):
            break
        token = ids_BKT[..., step].flatten()
        cache.take((row_B[:, None] * width + beams_BK).flatten())
    best = best.or_better(live_BK[:, 0] / max_tokens**length_penalty, live_BK[:, 0], ids_BKT[:, 0])
    longest = int((best.ids_BT != tokens.pad).sum(1).max())
    return Written(best.ids_BT[:, :longest], best.log_probability_B)


class _Best(NamedTuple):
    """The best text of each row so far."""

    score_B: Tensor
    log_probability_B: Tensor
    ids_BT: Tensor

    def or_better(self, score_B: Tensor, log_probability_B: Tensor, ids_BT: Tensor) -> _Best:
        wins_B = score_B > self.score_B
        return _Best(
            torch.where(wins_B, score_B, self.score_B),
            torch.where(wins_B, log_probability_B, self.log_probability_B),
            torch.where(wins_B[:, None], ids_BT, self.ids_BT),
        )


def _next(decoder: Decoder, token_B: Tensor, memory: Encoded, cache: Cache, tokens: DecoderTokens) -> Tensor:
    """Log-probabilities (B, V) of the next token, fp32."""
    logits_B1V = decoder(token_B[:, None], memory.sequence_BTW, memory.mask_BT, cache)
    log_BV: Tensor = logits_B1V[:, -1].float().log_softmax(-1)
    # Some tokenizers open and close with the same token.
    log_BV[:, [token for token in (tokens.first, tokens.pad) if token != tokens.last]] = -torch.inf
    return log_BV
