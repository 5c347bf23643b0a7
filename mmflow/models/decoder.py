"""A causal text decoder that reads a picture: it predicts each token from those before it and from a memory.

The memory is the image encoder's sequence (a captioner) or the fused question's (an answerer). With a cache each call
reads only its new tokens, and gives what the call over all of them would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmflow.core.errors import MisuseError
from mmflow.models.config import DecoderConfig

# Shapes: B batch, T tokens of this call, P tokens up to and with this call, R regions or tokens of the memory, M the
# memory's width, W the decoder's, H heads, D = W / H, V vocabulary.


class Cached(NamedTuple):
    """Keys and values of one layer: of the tokens read so far and of the memory."""

    keys_BHPD: Tensor
    values_BHPD: Tensor
    memory_keys_BHRD: Tensor
    memory_values_BHRD: Tensor


class Cache:
    """What a decoder has read; empty before its first call, then longer with every call."""

    def __init__(self) -> None:
        self.layers: list[Cached] = []
        self.mask_BR: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self.layers[0].keys_BHPD.shape[2] if self.layers else 0

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (int64), which may repeat: how a beam copies what it continues."""
        self.layers = [Cached(*(tensor.index_select(0, rows) for tensor in layer)) for layer in self.layers]
        self.mask_BR = None if self.mask_BR is None else self.mask_BR.index_select(0, rows)


class Vocabulary(nn.Module):
    """One table that tokens are looked up in and logits are read from (arXiv 1608.05859): tied weights under one name,
    read within the forward of the module that owns them, as ZeRO-3 asks."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width).normal_(std=0.02))

    def forward(self, inputs: Tensor) -> Tensor:
        """Token ids (B, T) of int64 to their vectors (B, T, W); vectors (B, T, W) to logits (B, T, V)."""
        if inputs.dtype == torch.int64:
            return nn.functional.embedding(inputs, self.weight)
        return nn.functional.linear(inputs, self.weight)


class Positions(nn.Module):
    """A learned vector a position."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).normal_(std=0.02))

    def forward(self, begin: int, end: int) -> Tensor:
        """(end - begin, W)."""
        return self.weight[begin:end]


class Layer(nn.Module):
    """Self-attention to what came before, cross-attention to the memory, a feed-forward net; each after its norm (arXiv
    2002.04745), which trains without a long warm-up."""

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
        queries, keys, values = (_heads(each, self.heads) for each in self.reads(self.norms[0](x_BTW)).chunk(3, -1))
        if cached is None:
            of_memory = [_heads(each, self.heads) for each in self.memory(memory_BRM).chunk(2, -1)]
            memory_keys, memory_values = of_memory
        else:
            keys = torch.cat([cached.keys_BHPD, keys], 2)
            values = torch.cat([cached.values_BHPD, values], 2)
            memory_keys, memory_values = cached.memory_keys_BHRD, cached.memory_values_BHRD
        x_BTW = x_BTW + self._drop(self.reads_out(self._attend(queries, keys, values, _causal(queries, keys))))
        looking = _heads(self.looks(self.norms[1](x_BTW)), self.heads)
        seen_BTW = self._look(looking, memory_keys, memory_values, mask_BR)
        x_BTW = x_BTW + self._drop(self.looks_out(seen_BTW))
        x_BTW = x_BTW + self._drop(self.feed(self.norms[2](x_BTW)))
        return x_BTW, Cached(keys, values, memory_keys, memory_values)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        found = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, dropout_p=dropout)
        return found.transpose(1, 2).flatten(2)

    def _look(self, queries: Tensor, keys: Tensor, values: Tensor, mask_BR: Tensor | None) -> Tensor:
        if mask_BR is None:
            return self._attend(queries, keys, values, None)
        # Attention over nothing is zero by SDPA's kernel for the CPU [torch 2.13], NaN by a plain softmax, and not
        # promised: a row whose memory is wholly masked (no picture) looks at all of it, and what it saw is put out.
        empty_B1 = ~mask_BR.any(1, keepdim=True)
        seen_BTW = self._attend(queries, keys, values, (mask_BR | empty_B1)[:, None, None])
        return seen_BTW.masked_fill(empty_B1[:, None], 0.0)

    def _drop(self, x_BTW: Tensor) -> Tensor:
        return nn.functional.dropout(x_BTW, self.dropout, self.training)


def _heads(x_BTW: Tensor, heads: int) -> Tensor:
    return x_BTW.view(*x_BTW.shape[:2], heads, -1).transpose(1, 2)


def _causal(queries_BHTD: Tensor, keys_BHPD: Tensor) -> Tensor | None:
    # Token t of this call stands at P - T + t of the whole, and sees all up to itself.
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
        """Logits (B, T, V) of the token after each of `token_ids_BT` (int64), which may be padded on the right only.

        `mask_BR` is True where the memory is real. With a `cache`, `token_ids_BT` are the tokens after those that it
        holds, and it takes them in; the memory is read at its first call alone. Raises MisuseError past `max_tokens`.
        """
        before = cache.num_tokens if cache is not None else 0
        after = before + token_ids_BT.shape[1]
        if after > self.max_tokens:
            raise MisuseError(
                f"{after} tokens for a decoder of {self.max_tokens}; raise model.max_tokens or cut the text"
            )
        if mask_BR is not None:
            mask_BR = mask_BR.bool()
        if cache is not None and before:
            mask_BR = cache.mask_BR
        else:
            memory_BRM = self.memory_norm(memory_BRM)
        x_BTW = self.vocabulary(token_ids_BT) + self.positions(before, after)
        x_BTW = nn.functional.dropout(x_BTW, self.dropout, self.training)
        layers: list[Cached] = []
        for number, layer in enumerate(self.layers):
            x_BTW, cached = layer(x_BTW, memory_BRM, mask_BR, cache.layers[number] if cache and before else None)
            layers.append(cached)
        if cache is not None:
            cache.layers, cache.mask_BR = layers, mask_BR
        logits_BTV: Tensor = self.vocabulary(self.norm(x_BTW))
        return logits_BTV
