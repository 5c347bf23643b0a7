"""How a sequence becomes one vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmflow.models.attention import Attention, Read

# Shapes: B batch, T tokens or regions, K the same or 1, W width, H heads, D width of a head. Masks are True where a
# token is real; None if all are.

ATTENTION_HEAD_WIDTH = 64  # of a learned query's heads, as in every ViT since the first


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
