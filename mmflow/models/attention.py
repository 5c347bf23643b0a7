"""Attention for our own layers: SDPA, or eager where the attention maps are requested."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError

# Shapes: B batch, Q places that read, K places that are read, W width, H heads, D width of a head.

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

    `key` is the recipe's key of its settings, for errors. Raises RecipeError if the heads do not divide the width.
    """

    def __init__(self, key: str, width: int, heads: int, layers: int, positions: int) -> None:
        super().__init__()
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
