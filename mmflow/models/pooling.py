"""How a sequence becomes one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.models.attention import Attention

# Shapes: B batch, T tokens or regions, W width. Masks are True where a token is real; None where all are.

ATTENTION_HEAD_WIDTH = 64  # of a learned query's heads, as in every ViT since the first


def pool_mean(sequence_BTW: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The mean of the real tokens, (B, W); zeros where a row has none."""
    if mask_BT is None:
        return sequence_BTW.mean(1)
    weights_BT1 = mask_BT.to(sequence_BTW.dtype).unsqueeze(-1)
    return (sequence_BTW * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def pool_last(sequence_BTW: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The last real token, (B, W)."""
    if mask_BT is None:
        return sequence_BTW[:, -1]
    return _take(sequence_BTW, _last_B(mask_BT))


def pool_eos(sequence_BTW: Tensor, mask_BT: Tensor, token_ids_BT: Tensor, eos: int | None) -> Tensor:
    """The first closing token (CLIP, arXiv 2103.00020, section 2.4), (B, W); the last real one where a row has none.

    `transformers` takes the first token of a row without a closing one, which a causal encoder has told nothing yet.
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

    def forward(self, sequence_BTW: Tensor, mask_BT: Tensor | None) -> Tensor:
        """(B, W)."""
        query_B1W = self.query.expand(sequence_BTW.shape[0], -1, -1)
        read_B1W, _ = self.attention(query_B1W, sequence_BTW, mask_BT)
        pooled_BW: Tensor = self.norm(read_B1W[:, 0])
        return pooled_BW


def _last_B(mask_BT: Tensor) -> Tensor:
    # argmax gives the first of several equal values, so look from behind.
    return mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)


def _take(sequence_BTW: Tensor, place_B: Tensor) -> Tensor:
    return sequence_BTW[torch.arange(place_B.shape[0], device=place_B.device), place_B]
