"""Attention for our own layers, by SDPA or eager where its maps are requested, and poolings of a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.config import VideoConfig, WindowsConfig

# Shapes: B batch, Q places that read, K places that are read, T tokens or regions, W width, H heads, D width of a head.

ATTENTION_HEAD_WIDTH = 64  # of a learned query's heads, as in every ViT since the first

Read = tuple[Tensor, Tensor | None]
"""What each place read (B, Q, W), and its attention weights (B, H, Q, K) if `maps` is set, else None."""


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (arXiv 1706.03762, equation 1) to another sequence or to itself.

    Each projection is called as a module, unlike in `nn.MultiheadAttention`: ZeRO-3 gathers a weight in the forward of
    the module that owns it.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BQW: Tensor, memory_BKW: Tensor, mask_BK: Tensor | None = None, *, maps: bool = False) -> Read:
        """`mask_BK` is True where the memory is real; every row needs at least one such place."""
        query_BHQD = self._split(self.query(x_BQW))
        key_BHKD = self._split(self.key(memory_BKW))
        value_BHKD = self._split(self.value(memory_BKW))
        mask_B11K = None if mask_BK is None else mask_BK[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        weights_BHQK = None
        if maps:
            scores_BHQK = query_BHQD @ key_BHKD.transpose(-1, -2) * query_BHQD.shape[-1] ** -0.5
            if mask_B11K is not None:
                scores_BHQK = scores_BHQK.masked_fill(~mask_B11K, -torch.inf)
            weights_BHQK = scores_BHQK.softmax(-1)
            read_BHQD = nn.functional.dropout(weights_BHQK, dropout) @ value_BHKD
        else:
            read_BHQD = nn.functional.scaled_dot_product_attention(
                query_BHQD, key_BHKD, value_BHKD, attn_mask=mask_B11K, dropout_p=dropout
            )
        return self.output(read_BHQD.transpose(1, 2).flatten(2)), weights_BHQK

    def _split(self, sequence_BKW: Tensor) -> Tensor:
        return sequence_BKW.view(*sequence_BKW.shape[:2], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """A layer of self-attention and a feed-forward net, each after its norm (pre-norm, as in CLIP and CLIP4Clip)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, sequence_BKW: Tensor, mask_BK: Tensor | None = None, *, maps: bool = False) -> Read:
        """The sequence after it read itself."""
        normed_BKW = self.attention_norm(sequence_BKW)
        read_BKW, weights_BHKK = self.attention(normed_BKW, normed_BKW, mask_BK, maps=maps)
        sequence_BKW = sequence_BKW + read_BKW
        return sequence_BKW + self.feed_forward(self.feed_forward_norm(sequence_BKW)), weights_BHKK


class Blocks(nn.Module):
    """A small transformer over a few vectors (a clip's frames, a document's windows) with learned positions.

    `key` is the recipe's key of `config`, for errors. Raises RecipeError if the heads do not divide the width.
    """

    def __init__(self, key: str, config: WindowsConfig | VideoConfig, width: int, positions: int) -> None:
        super().__init__()
        layers, heads = config.layers or 0, config.heads or 1  # VideoConfig requires both where there are Blocks
        if width % heads:
            raise RecipeError(f"{key}.heads: {heads} does not divide the width, {width}; give another number")
        self.positions = nn.Embedding(positions, width)
        nn.init.normal_(self.positions.weight, std=0.02)  # as in BERT, for vectors that a norm follows
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, vectors_BKW: Tensor, mask_BK: Tensor | None, *, maps: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The vectors after they read each other, normed, (B, K, W), and each layer's weights if `maps` is set."""
        places_K = torch.arange(vectors_BKW.shape[1], device=vectors_BKW.device)
        vectors_BKW = vectors_BKW + self.positions(places_K)
        weights = []
        for layer in self.layers:
            vectors_BKW, weights_BHKK = layer(vectors_BKW, mask_BK, maps=maps)
            weights.append(weights_BHKK)
        return self.norm(vectors_BKW), tuple(weights) if maps else None


def pool_mean(sequence_BTW: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean of the real tokens, (B, W); zeros for rows without any."""
    weights_BT1 = mask_BT.to(sequence_BTW.dtype).unsqueeze(-1)
    return (sequence_BTW * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def pool_last(sequence_BTW: Tensor, mask_BT: Tensor) -> Tensor:
    """The last real token, (B, W)."""
    return _take(sequence_BTW, _last_B(mask_BT))


def pool_eos(sequence_BTW: Tensor, mask_BT: Tensor, token_ids_BT: Tensor, eos: int | None) -> Tensor:
    """The first closing token (CLIP, arXiv 2103.00020, section 2.4), (B, W); the last real token of rows without one.

    For such rows `transformers` takes the first token, which in a causal encoder has read nothing yet.
    """
    if eos is None:
        return pool_last(sequence_BTW, mask_BT)
    closes_BT = (token_ids_BT == eos) & mask_BT
    first_B = closes_BT.int().argmax(1)
    return _take(sequence_BTW, torch.where(closes_BT.any(1), first_B, _last_B(mask_BT)))


class AttentionPooling(nn.Module):
    """A learned query that attends to the sequence (pooling by attention, arXiv 1810.00825, section 3.2), normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        heads = width // ATTENTION_HEAD_WIDTH if width % ATTENTION_HEAD_WIDTH == 0 else 1
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, sequence_BTW: Tensor, mask_BT: Tensor | None, *, maps: bool = False) -> Read:
        """(B, W), and the query's weights (B, H, 1, T) if `maps` is set, else None."""
        query_B1W = self.query.expand(sequence_BTW.shape[0], -1, -1)
        read_B1W, weights_BH1T = self.attention(query_B1W, sequence_BTW, mask_BT, maps=maps)
        pooled_BW: Tensor = self.norm(read_B1W[:, 0])
        return pooled_BW, weights_BH1T


def pool_by_probe(head: Any, sequence_BTW: Tensor) -> tuple[Tensor, Tensor]:
    """The output of SigLIP's own pooler (arXiv 2303.15343; arXiv 2106.04560, section 3.2), (B, W), and its weights
    (B, H, 1, T), which `nn.MultiheadAttention` only gives as copies without a gradient."""
    attention = head.attention

    def project(part: int, inputs_BKW: Tensor) -> Tensor:
        weight, bias = attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias.chunk(3)[part]
        projected_BKW = nn.functional.linear(inputs_BKW, weight, bias)
        return projected_BKW.view(*projected_BKW.shape[:2], attention.num_heads, -1).transpose(1, 2)

    query_BH1D = project(0, head.probe.expand(len(sequence_BTW), -1, -1))
    key_BHTD, value_BHTD = project(1, sequence_BTW), project(2, sequence_BTW)
    weights_BH1T = (query_BH1D @ key_BHTD.transpose(-1, -2) * query_BH1D.shape[-1] ** -0.5).softmax(-1)
    read_B1W = attention.out_proj((weights_BH1T @ value_BHTD).transpose(1, 2).flatten(2))
    pooled_BW: Tensor = (read_B1W + head.mlp(head.layernorm(read_B1W)))[:, 0]
    return pooled_BW, weights_BH1T


def _last_B(mask_BT: Tensor) -> Tensor:
    # argmax gives the first of several equal values, so search from the end.
    return mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)


def _take(sequence_BTW: Tensor, place_B: Tensor) -> Tensor:
    return sequence_BTW[torch.arange(place_B.shape[0], device=place_B.device), place_B]
