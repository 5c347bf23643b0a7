"""Fusions without attention: each token, each region and the whole are mixed with the other side's pooled vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.models.encoders import Encoded
from mmflow.models.fused import Fused, blanked

# Shapes: B batch, T tokens, R regions, L either or 1, W width of the fusion, M width of an encoder.


class Concatenated(nn.Module):
    """LayerNorm(Dropout(GELU(A [t; i] + a))) of a text vector t and an image vector i, side by side."""

    def __init__(self, text_width: int, image_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(text_width + image_width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, text_BLM: Tensor, image_BLM: Tensor) -> Tensor:
        """(B, L, M) each, L the same → (B, L, W)."""
        mixed: Tensor = self.norm(self.dropout(nn.functional.gelu(self.inner(torch.cat([text_BLM, image_BLM], -1)))))
        return mixed


class Gated(nn.Module):
    """A gate for each modality (GMU, arXiv 1702.01992, section 3.1, the multimodal case of figure 2a):

    h_m = tanh(W_m x_m),  z_m = σ(Z_m [t; i]),  h = z_t ∗ h_t + z_i ∗ h_i.
    """

    def __init__(self, text_width: int, image_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.text = nn.Linear(text_width, width, bias=False)
        self.image = nn.Linear(image_width, width, bias=False)
        self.gates = nn.Linear(text_width + image_width, 2 * width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text_BLM: Tensor, image_BLM: Tensor) -> Tensor:
        """(B, L, M) each, L the same → (B, L, W)."""
        gate_text, gate_image = self.gates(torch.cat([text_BLM, image_BLM], -1)).sigmoid().chunk(2, -1)
        mixed = gate_text * self.text(text_BLM).tanh() + gate_image * self.image(image_BLM).tanh()
        dropped: Tensor = self.dropout(mixed)
        return dropped


class Mixing(nn.Module):
    """One mixing of two vectors, used for all that is read: the pooled pair, each token with the pooled picture, each
    region with the pooled text. A modality that is missing counts as zeros."""

    def __init__(self, mix: Concatenated | Gated, reads: frozenset[str]) -> None:
        super().__init__()
        self.mix = mix
        self.reads = reads

    def forward(self, image: Encoded, text: Encoded, *, attentions: bool = False) -> Fused:
        """Fused vectors; there are no attention maps to give."""
        image, text = blanked(image), blanked(text)
        text_B1M, image_B1M = text.pooled_BW[:, None], image.pooled_BW[:, None]
        tokens_BTW, regions_BRW, pooled_BW = None, None, None
        if "text" in self.reads:
            tokens_BTW = self.mix(text.sequence_BTW, image_B1M.expand(-1, text.sequence_BTW.shape[1], -1))
        if "image" in self.reads:
            regions_BRW = self.mix(text_B1M.expand(-1, image.sequence_BTW.shape[1], -1), image.sequence_BTW)
        if "pooled" in self.reads:
            pooled_BW = self.mix(text_B1M, image_B1M)[:, 0]
        return Fused(tokens_BTW, regions_BRW, pooled_BW, {} if attentions else None)
