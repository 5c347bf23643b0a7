"""The kinds of fusion by name: those by attention, which are in `streams`, and two that mix vectors without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.config import FusionConfig
from mmflow.models.encoders import Encoded, Fused
from mmflow.models.streams import EachReadsBoth, EachReadsOther, JointLayer, Streams, TextReadsImage

# Shapes: B batch, T tokens, R regions, L either or 1, W width of the fusion, M width of an encoder.


class Concatenated(nn.Module):
    """LayerNorm(Dropout(GELU(A [t; i] + a))) of a text vector t and an image vector i, side by side."""

    def __init__(self, text_width: int, image_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(text_width + image_width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, text_BLM: Tensor, image_BLM: Tensor) -> Tensor:
        """(B, L, M) each, with the same L → (B, L, W)."""
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
        """(B, L, M) each, with the same L → (B, L, W)."""
        gate_text, gate_image = self.gates(torch.cat([text_BLM, image_BLM], -1)).sigmoid().chunk(2, -1)
        mixed = gate_text * self.text(text_BLM).tanh() + gate_image * self.image(image_BLM).tanh()
        dropped: Tensor = self.dropout(mixed)
        return dropped


class Mixing(nn.Module):
    """One mixing of two vectors for everything that is read: the pooled pair, each token with the pooled image, each
    region with the pooled text. A missing modality counts as zeros."""

    def __init__(
        self,
        mix: type[Concatenated | Gated],
        config: FusionConfig,
        text_width: int,
        image_width: int,
        reads: frozenset[str],
    ) -> None:
        super().__init__()
        self.mix = mix(text_width, image_width, config.width, config.dropout)
        self.reads = reads

    def forward(self, image: Encoded, text: Encoded, *, attentions: bool = False) -> Fused:
        """Fused vectors; there are no attention maps."""
        (text_BTM, text_BM, _), (image_BRM, image_BM, _) = text.blanked(), image.blanked()
        text_B1M, image_B1M = text_BM[:, None], image_BM[:, None]
        text_BTW, image_BRW, pooled_BW = None, None, None
        if "text" in self.reads:
            text_BTW = self.mix(text_BTM, image_B1M.expand(-1, text_BTM.shape[1], -1))
        if "image" in self.reads:
            image_BRW = self.mix(text_B1M.expand(-1, image_BRM.shape[1], -1), image_BRM)
        if "pooled" in self.reads:
            pooled_BW = self.mix(text_B1M, image_B1M)[:, 0]
        return Fused(text_BTW, image_BRW, pooled_BW, {} if attentions else None)


Fusion = Mixing | Streams
"""Called as `fusion(image: Encoded, text: Encoded, *, attentions=False) -> Fused`."""

FUSIONS: dict[str, Callable[[FusionConfig, int, int, frozenset[str]], Fusion]] = {
    "concatenation": partial(Mixing, Concatenated),
    "gated": partial(Mixing, Gated),
    "cross_attention": partial(Streams, TextReadsImage),
    "both_directions": partial(Streams, EachReadsOther),
    "co_attention": partial(Streams, EachReadsBoth),
    "single_stream": partial(Streams, JointLayer),
}
"""Kind → its module from the settings, the width of text and of image, and what the heads read."""


def build_fusion(key: str, config: FusionConfig, image_width: int, text_width: int, reads: frozenset[str]) -> Fusion:
    """A fusion with fresh weights, without the parts that nothing reads; `reads` is some of `pooled`, `text` and
    `image`. Raises RecipeError if it is empty."""
    if not reads:
        raise RecipeError(f"{key}: nothing reads it; name one or more heads, or leave the fusion out")
    return FUSIONS[config.kind](config, text_width, image_width, reads)
