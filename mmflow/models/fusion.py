"""The fusion that a recipe names, with the parts that its heads read and no others."""

from __future__ import annotations

from mmflow.core.errors import RecipeError
from mmflow.models.config import FusionConfig
from mmflow.models.mixing import Concatenated, Gated, Mixing
from mmflow.models.single_stream import SingleStream
from mmflow.models.two_stream import EachReadsBoth, EachReadsOther, TextReadsImage, TwoStream

Fusion = Mixing | TwoStream | SingleStream
"""Called as `fusion(image: Encoded, text: Encoded, *, attentions=False) -> Fused`."""

READS = {"matching": "pooled", "classes": "pooled", "masked_language": "text", "masked_image": "image"}
"""What each head reads of Fused: `pooled_BW`, `text_BTW` or `image_BRW`."""

MIXES: dict[str, type[Concatenated | Gated]] = {"concatenation": Concatenated, "gated": Gated}
TWO_STREAMS: dict[str, type[TextReadsImage | EachReadsOther | EachReadsBoth]] = {
    "cross_attention": TextReadsImage,
    "both_directions": EachReadsOther,
    "co_attention": EachReadsBoth,
}


def build_fusion(key: str, config: FusionConfig, image_width: int, text_width: int, reads: frozenset[str]) -> Fusion:
    """A fusion with fresh weights of which `reads` (`pooled`, `text`, `image`) is read. Raises RecipeError where
    nothing reads it."""
    if not reads:
        raise RecipeError(f"{key}: nothing reads it; name one or more heads, or leave the fusion out")
    if config.kind in MIXES:
        return Mixing(MIXES[config.kind](text_width, image_width, config.width, config.dropout), reads)
    assert config.layers is not None
    assert config.heads is not None
    if config.kind == "single_stream":
        return SingleStream(
            text_width,
            image_width,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
            reads=reads,
        )
    return TwoStream(
        TWO_STREAMS[config.kind],
        text_width,
        image_width,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        dropout=config.dropout,
        reads=reads,
    )
