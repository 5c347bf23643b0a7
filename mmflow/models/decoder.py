"""A causal text decoder that reads an image: it predicts each token from the tokens before it and a memory.

The memory is the image encoder's sequence (captions) or a question's fused tokens (answers). With a cache each call
reads only its new tokens, and gives what a call over all of them would give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmflow.core.errors import MisuseError
from mmflow.models.config import DecoderConfig

# Shapes: B batch, T tokens of this call, P tokens up to and including this call, R regions or tokens of the memory, M
# the memory's width, W the decoder's, H heads, D = W / H, V vocabulary.


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


class Vocabulary(nn.Module):
    """One table for looking up tokens and computing logits (arXiv 1608.05859): tied weights under one name, read in the
    forward of the module that owns them, as ZeRO-3 requires."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width).normal_(std=0.02))

    def forward(self, inputs: Tensor) -> Tensor:
        """Token ids (B, T) of int64 to their vectors (B, T, W); vectors (B, T, W) to logits (B, T, V)."""
        if inputs.dtype == torch.int64:
            return nn.functional.embedding(inputs, self.weight)
        return nn.functional.linear(inputs, self.weight)


class Positions(nn.Module):
    """A learned vector for each position."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).normal_(std=0.02))

    def forward(self, start: int, end: int) -> Tensor:
        """(end - start, W)."""
        return self.weight[start:end]


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
        self.vocabulary = Vocabulary(vocabulary_size, config.width)
        self.positions = Positions(max_tokens, config.width)
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
        x_BTW = self.vocabulary(token_ids_BT) + self.positions(start, end)
        x_BTW = nn.functional.dropout(x_BTW, self.dropout, self.training)
        layers: list[Cached] = []
        for number, layer in enumerate(self.layers):
            x_BTW, cached = layer(x_BTW, memory_BRM, mask_BR, cache.layers[number] if cache and start else None)
            layers.append(cached)
        if cache is not None:
            cache.layers, cache.mask_BR = layers, mask_BR
        logits_BTV: Tensor = self.vocabulary(self.norm(x_BTW))
        return logits_BTV
