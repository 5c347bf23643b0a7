"""Fusion by one transformer over text and image in one sequence (UNITER, arXiv 1909.11740, section 3.1; VisualBERT,
arXiv 1908.03557, section 3.2): every place reads every other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.models.encoders import Encoded
from mmflow.models.fused import Fused, blanked, mask_of
from mmflow.models.layers import AttentionLayer, Entrance, FeedForward, Pooler

# Shapes: B batch, T tokens, R regions, L = T + R, W width of the fusion, H heads.


class Layer(nn.Module):
    """A layer of BERT (arXiv 1810.04805)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = AttentionLayer(width, heads, dropout)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, x_BLW: Tensor, mask_BL: Tensor, attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """The sequence after this layer, and its map (B, H, L, L) on request."""
        x_BLW, map_BHLL = self.attention(x_BLW, x_BLW, mask_BL, attentions)
        return self.feed_forward(x_BLW), map_BHLL


class SingleStream(nn.Module):
    """The layers between the encoders and the heads."""

    def __init__(
        self,
        text_width: int,
        image_width: int,
        *,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        reads: frozenset[str],
    ) -> None:
        super().__init__()
        self.reads = reads
        self.text_entrance = Entrance(text_width, width, dropout)
        self.image_entrance = Entrance(image_width, width, dropout)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.pooler = Pooler(width) if "pooled" in reads else None

    def forward(self, image: Encoded, text: Encoded, *, attentions: bool = False) -> Fused:
        """Fused vectors, and the maps of each layer on request."""
        image, text = blanked(image), blanked(text)
        num_tokens = text.sequence_BTW.shape[1]
        mask_BL = torch.cat([mask_of(text), mask_of(image)], 1)
        x_BLW = torch.cat([self.text_entrance(text.sequence_BTW), self.image_entrance(image.sequence_BTW)], 1)
        joint: tuple[Tensor, ...] = ()
        for layer in self.layers:
            x_BLW, map_BHLL = layer(x_BLW, mask_BL, attentions)
            joint += () if map_BHLL is None else (map_BHLL,)
        return Fused(
            x_BLW[:, :num_tokens] if "text" in self.reads else None,
            x_BLW[:, num_tokens:] if "image" in self.reads else None,
            self.pooler(x_BLW) if self.pooler is not None else None,
            {
                "joint": joint,
                "text_to_image": tuple(each[:, :, :num_tokens, num_tokens:] for each in joint),
                "image_to_text": tuple(each[:, :, num_tokens:, :num_tokens] for each in joint),
            }
            if attentions
            else None,
        )
