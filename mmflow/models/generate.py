"""Text out of a decoder: greedy, beam search and nucleus sampling, all rows of a batch at once, with its cache.

Each function writes what follows the opening token, up to and with the closing one, and pads rows that are done.
Padding and the opening token are never written: no target has them, and a row that held one could not be told from a
short one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmflow.models.decoder import Cache, Decoder

# Shapes: B batch, K beams, T tokens written, R regions or tokens of the memory, M the memory's width, V vocabulary.


class Marks(NamedTuple):
    """The tokenizer's ids of the opening token, the closing one and padding."""

    first: int
    last: int
    pad: int


class Memory(NamedTuple):
    """What a decoder reads beside its own text: (B, R, M), and its mask (B, R), True where real; None: all of it."""

    sequence_BRM: Tensor
    mask_BR: Tensor | None = None


class Written(NamedTuple):
    """Token ids (B, T) of int64 without the opening token, and the log-probability (B,) that the decoder gave them."""

    token_ids_BT: Tensor
    log_probability_B: Tensor


Choice = Callable[[Tensor, int], Tensor]  # (log-probabilities (B, V), tokens written before) → token ids (B,)


@torch.inference_mode()
def greedy(decoder: Decoder, memory: Memory, marks: Marks, max_tokens: int) -> Written:
    """The likeliest token at every step."""
    return _one_by_one(decoder, memory, marks, max_tokens, lambda log_BV, _: log_BV.argmax(-1))


@torch.inference_mode()
def nucleus(
    decoder: Decoder, memory: Memory, marks: Marks, max_tokens: int, *, share: float, generator: torch.Generator
) -> Written:
    """Each token drawn from the fewest that have `share` (0 to 1) of the probability (arXiv 1904.09751, section 3.1).

    All random numbers are drawn first, one a row and step, so that a row's text depends on its own number alone and not
    on how long the others are.
    """
    rows, device = memory.sequence_BRM.shape[0], memory.sequence_BRM.device
    drawn_BT = torch.rand(rows, max_tokens, generator=generator, dtype=torch.float64, device=generator.device)

    def choose(log_BV: Tensor, step: int) -> Tensor:
        likelihood_BV, ids_BV = log_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        ends_BV = likelihood_BV.cumsum(-1)
        # A token is in the nucleus if those that are likelier do not reach the share: the first always is.
        kept_B1 = (ends_BV - likelihood_BV < share).sum(-1, keepdim=True)
        drawn_B1 = drawn_BT[:, step, None].to(device) * ends_BV.gather(1, kept_B1 - 1)
        place_B1 = torch.searchsorted(ends_BV, drawn_B1, right=True).minimum(kept_B1 - 1)
        return ids_BV.gather(1, place_B1).squeeze(1)

    return _one_by_one(decoder, memory, marks, max_tokens, choose)


def _one_by_one(decoder: Decoder, memory: Memory, marks: Marks, max_tokens: int, choose: Choice) -> Written:
    sequence, mask = memory
    rows, device = sequence.shape[0], sequence.device
    cache = Cache()
    token_B = torch.full((rows,), marks.first, dtype=torch.int64, device=device)
    done_B = torch.zeros(rows, dtype=torch.bool, device=device)
    total_B = torch.zeros(rows, device=device)
    written: list[Tensor] = []
    for step in range(max_tokens):
        log_BV = _next(decoder, token_B, sequence, mask, cache, marks)
        chosen_B = choose(log_BV, step)
        total_B = total_B + log_BV.gather(1, chosen_B[:, None]).squeeze(1).masked_fill(done_B, 0.0)
        token_B = chosen_B.masked_fill(done_B, marks.pad)
        written.append(token_B)
        done_B = done_B | (chosen_B == marks.last)
        if bool(done_B.all()):
            break
    return Written(torch.stack(written, 1), total_B)


@torch.inference_mode()
def beam(
    decoder: Decoder, memory: Memory, marks: Marks, max_tokens: int, *, width: int, length_penalty: float = 0.0
) -> Written:
    """The text with the best log-probability / length ** `length_penalty` among those that `width` beams come by.

    The penalty is 0 or more; above 0 it favours longer text. Length counts the closing token. A row ends when no beam
    can still beat the best text that it has, so it loses nothing by ending. Text that has not closed by `max_tokens`
    counts as it is. With as many beams as there are texts this is exhaustive search, with one it is greedy.
    """
    sequence, mask = memory
    rows, device = sequence.shape[0], sequence.device
    cache = Cache()
    row_B = torch.arange(rows, device=device)
    live_BK = torch.full((rows, width), -torch.inf, device=device)
    live_BK[:, 0] = 0.0  # all beams are the same text yet: one of them goes on, or the others would be its copies
    ids_BKT = torch.full((rows, width, max_tokens), marks.pad, dtype=torch.int64, device=device)
    best = _Best(torch.full((rows,), -torch.inf, device=device), live_BK[:, 0], ids_BKT[:, 0])
    token = torch.full((rows * width,), marks.first, dtype=torch.int64, device=device)
    sequence = sequence.repeat_interleave(width, 0)
    mask = None if mask is None else mask.repeat_interleave(width, 0)
    for step in range(max_tokens):
        log_BKV = _next(decoder, token, sequence, mask, cache, marks).view(rows, width, -1)
        total_BKV = live_BK[..., None] + log_BKV
        # A text that closes counts where it is among the best `width` of all candidates.
        worst_B1 = total_BKV.flatten(1).topk(width).values[:, -1:]
        closed_BK = total_BKV[..., marks.last]
        closed_B, beam_B = closed_BK.masked_fill(closed_BK < worst_B1, -torch.inf).max(1)
        closed_ids_BT = ids_BKT[row_B, beam_B].clone()
        closed_ids_BT[:, step] = marks.last
        best = best.or_better(closed_B / (step + 1) ** length_penalty, closed_B, closed_ids_BT)
        total_BKV[..., marks.last] = -torch.inf
        live_BK, place_BK = total_BKV.flatten(1).topk(width)
        beams_BK = place_BK // total_BKV.shape[-1]
        ids_BKT = ids_BKT[row_B[:, None], beams_BK]
        ids_BKT[..., step] = place_BK % total_BKV.shape[-1]
        # A log-probability only falls, so the most that a beam can come to is this one over the longest length.
        done_B = best.score_B >= live_BK[:, 0] / max_tokens**length_penalty
        live_BK = live_BK.masked_fill(done_B[:, None], -torch.inf)
        if bool(done_B.all()):
            break
        token = ids_BKT[..., step].flatten()
        cache.take((row_B[:, None] * width + beams_BK).flatten())
    best = best.or_better(live_BK[:, 0] / max_tokens**length_penalty, live_BK[:, 0], ids_BKT[:, 0])
    longest = int((best.ids_BT != marks.pad).sum(1).max())
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


def _next(
    decoder: Decoder, token_B: Tensor, sequence: Tensor, mask: Tensor | None, cache: Cache, marks: Marks
) -> Tensor:
    """Log-probabilities (B, V) of the next token, fp32."""
    log_BV: Tensor = decoder(token_B[:, None], sequence, mask, cache)[:, -1].float().log_softmax(-1)
    # Some tokenizers open and close with one mark.
    log_BV[:, [each for each in (marks.first, marks.pad) if each != marks.last]] = -torch.inf
    return log_BV
