"""A causal text decoder that reads an image, and text from it by greedy, beam search and nucleus sampling.

It predicts each token from the tokens before it and a memory: the image encoder's sequence (captions) or a question's
fused tokens (answers). With a cache each call reads only its new tokens, and gives what a call over all would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmflow.core.errors import MisuseError, RecipeError
from mmflow.loading.tokens import special_tokens
from mmflow.models.config import DecoderConfig
from mmflow.models.encoders import Encoded

# Shapes: B batch, T tokens of this call or written, P tokens up to and including this call, R regions or tokens of the
# memory, M the memory's width, W the decoder's, H heads, D = W / H, K beams, V vocabulary.


class Cached(NamedTuple):
    """Keys and values of one layer: of the tokens read so far and of the memory."""

    keys_BHPD: Tensor
    values_BHPD: Tensor
    memory_keys_BHRD: Tensor
    memory_values_BHRD: Tensor


class Cache:
    """What a decoder has read: empty before its first call, longer after every call."""

    def __init__(self) -> None:
        self.layers: list[Cached] = []
        self.mask_BR: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self.layers[0].keys_BHPD.shape[2] if self.layers else 0

    def take(self, rows: Tensor) -> None:
        """Continue with these rows (int64), which may repeat: so a beam copies what it continues."""
        self.layers = [Cached(*(tensor.index_select(0, rows) for tensor in layer)) for layer in self.layers]
        self.mask_BR = None if self.mask_BR is None else self.mask_BR.index_select(0, rows)


class Table(nn.Module):
    """A learned vector for each position, or for each token; those of tokens also give logits (arXiv 1608.05859): tied
    weights under one name, read in the forward of the module that owns them, as ZeRO-3 requires."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width).normal_(std=0.02))

    def forward(self, inputs: Tensor) -> Tensor:
        """Ids (…) of int64 to their vectors (…, W); vectors (…, W) to logits (…, size)."""
        if inputs.dtype == torch.int64:
            return nn.functional.embedding(inputs, self.weight)
        return nn.functional.linear(inputs, self.weight)


class Layer(nn.Module):
    """Self-attention to the tokens so far, cross-attention to the memory, a feed-forward net; each after its norm
    (arXiv 2002.04745), which trains without a long warm-up."""

    def __init__(self, config: DecoderConfig, memory_width: int) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = config.dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.reads = nn.Linear(width, 3 * width)
        self.reads_out = nn.Linear(width, width)
        self.looks = nn.Linear(width, width)
        self.memory = nn.Linear(memory_width, 2 * width)
        self.looks_out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x_BTW: Tensor, memory_BRM: Tensor, mask_BR: Tensor | None, cached: Cached | None
    ) -> tuple[Tensor, Cached]:
        """The tokens after this layer, and the cache with them in it."""
        queries, keys, values = (self._split(part) for part in self.reads(self.norms[0](x_BTW)).chunk(3, -1))
        if cached is None:
            memory_keys, memory_values = (self._split(part) for part in self.memory(memory_BRM).chunk(2, -1))
        else:
            keys = torch.cat([cached.keys_BHPD, keys], 2)
            values = torch.cat([cached.values_BHPD, values], 2)
            memory_keys, memory_values = cached.memory_keys_BHRD, cached.memory_values_BHRD
        read_BTW = self._attend(queries, keys, values, _causal(queries, keys))
        x_BTW = x_BTW + self._drop(self.reads_out(read_BTW))
        looked_BTW = self._look(self._split(self.looks(self.norms[1](x_BTW))), memory_keys, memory_values, mask_BR)
        x_BTW = x_BTW + self._drop(self.looks_out(looked_BTW))
        x_BTW = x_BTW + self._drop(self.feed(self.norms[2](x_BTW)))
        return x_BTW, Cached(keys, values, memory_keys, memory_values)

    def _look(self, queries: Tensor, keys: Tensor, values: Tensor, mask_BR: Tensor | None) -> Tensor:
        if mask_BR is None:
            return self._attend(queries, keys, values, None)
        # Attention over nothing is zero in SDPA's CPU kernel [torch 2.13], NaN in a plain softmax, and not specified.
        # So a row with a fully masked memory (no image) reads all of it, and the result is dropped.
        empty_B1 = ~mask_BR.any(1, keepdim=True)
        read_BTW = self._attend(queries, keys, values, (mask_BR | empty_B1)[:, None, None])
        return read_BTW.masked_fill(empty_B1[:, None], 0.0)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        read = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, dropout_p=dropout)
        return read.transpose(1, 2).flatten(2)

    def _drop(self, x_BTW: Tensor) -> Tensor:
        return nn.functional.dropout(x_BTW, self.dropout, self.training)

    def _split(self, x_BTW: Tensor) -> Tensor:
        return x_BTW.view(*x_BTW.shape[:2], self.heads, -1).transpose(1, 2)


def _causal(queries_BHTD: Tensor, keys_BHPD: Tensor) -> Tensor | None:
    # Token t of this call is at position P - T + t of the whole text, and sees everything up to itself.
    num_new, num_all = queries_BHTD.shape[2], keys_BHPD.shape[2]
    if num_new == 1:
        return None
    return torch.ones(num_new, num_all, dtype=torch.bool, device=keys_BHPD.device).tril(num_all - num_new)


class Decoder(nn.Module):
    """Token ids and a memory to the logits of the next token."""

    def __init__(self, config: DecoderConfig, *, memory_width: int, vocabulary_size: int, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.dropout = config.dropout
        self.vocabulary = Table(vocabulary_size, config.width)
        self.positions = Table(max_tokens, config.width)
        self.memory_norm = nn.LayerNorm(memory_width)
        self.layers = nn.ModuleList(Layer(config, memory_width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, token_ids_BT: Tensor, memory_BRM: Tensor, mask_BR: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `token_ids_BT` (int64), which may only be padded on the right.

        `mask_BR` is True where the memory is real. With a `cache`, `token_ids_BT` are the tokens after those in it, and
        are added to it; the memory is only read in the first call. Raises MisuseError beyond `max_tokens`.
        """
        start = cache.num_tokens if cache is not None else 0
        end = start + token_ids_BT.shape[1]
        if end > self.max_tokens:
            raise MisuseError(
                f"{end} tokens for a decoder of {self.max_tokens}; raise model.max_tokens or shorten the text"
            )
        if cache is not None and start:
            mask_BR = cache.mask_BR
        else:
            mask_BR = None if mask_BR is None else mask_BR.bool()
            memory_BRM = self.memory_norm(memory_BRM)
        x_BTW = self.vocabulary(token_ids_BT) + self.positions(torch.arange(start, end, device=token_ids_BT.device))
        x_BTW = nn.functional.dropout(x_BTW, self.dropout, self.training)
        layers: list[Cached] = []
        for number, layer in enumerate(self.layers):
            x_BTW, cached = layer(x_BTW, memory_BRM, mask_BR, cache.layers[number] if cache and start else None)
            layers.append(cached)
        if cache is not None:
            cache.layers, cache.mask_BR = layers, mask_BR
        logits_BTV: Tensor = self.vocabulary(self.norm(x_BTW))
        return logits_BTV


# --- writing text -----------------------------------------------------------------------------------------------------
# Each search writes what follows the opening token, up to and including the closing one, for all rows of a batch at
# once, and pads finished rows. It never writes padding or the opening token: no target contains them, and a row with
# one would look like a short row.


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
