"""Fusions by cross-attention of two streams that stay apart: one reads the other, or each reads both."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from mmflow.models.encoders import Encoded
from mmflow.models.fused import Fused, blanked, mask_of
from mmflow.models.layers import AttentionLayer, Entrance, FeedForward, Pooler

# Shapes: B batch, T tokens, R regions, W width of the fusion, M width of an encoder, H heads.

Maps = dict[str, Tensor]


class TextReadsImage(nn.Module):
    """Text attends to itself, then to the image, then thinks (ALBEF's multimodal encoder, arXiv 2107.07651, section
    3.1; BLIP's image-grounded text encoder, arXiv 2201.12086). The image stays as it entered."""

    def __init__(self, width: int, heads: int, dropout: float, streams: frozenset[str]) -> None:
        super().__init__()
        self.self_attention = AttentionLayer(width, heads, dropout)
        self.cross_attention = AttentionLayer(width, heads, dropout)
        self.feed_forward = FeedForward(width, dropout)

    def forward(
        self, text_BTW: Tensor, text_BT: Tensor, image_BRW: Tensor, image_BR: Tensor, attentions: bool
    ) -> tuple[Tensor, Tensor, Maps]:
        """Both streams after this layer, and the maps by name."""
        text_BTW, _ = self.self_attention(text_BTW, text_BTW, text_BT)
        text_BTW, map_BHTR = self.cross_attention(text_BTW, image_BRW, image_BR, attentions)
        return self.feed_forward(text_BTW), image_BRW, _named(text_to_image=map_BHTR)


class EachReadsOther(nn.Module):
    """Each stream attends to the other, then thinks: ViLBERT's co-attentional layer (arXiv 1908.02265, section 2.2 and
    figure 2b). A stream that nothing reads afterwards is left out of the last layer."""

    def __init__(self, width: int, heads: int, dropout: float, streams: frozenset[str]) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({stream: AttentionLayer(width, heads, dropout) for stream in sorted(streams)})
        self.feed_forward = nn.ModuleDict({stream: FeedForward(width, dropout) for stream in sorted(streams)})

    def forward(
        self, text_BTW: Tensor, text_BT: Tensor, image_BRW: Tensor, image_BR: Tensor, attentions: bool
    ) -> tuple[Tensor, Tensor, Maps]:
        """Both streams after this layer, and the maps by name."""
        new_text, new_image, map_BHTR, map_BHRT = text_BTW, image_BRW, None, None
        if "text" in self.attention:
            new_text, map_BHTR = self.attention["text"](text_BTW, image_BRW, image_BR, attentions)
            new_text = self.feed_forward["text"](new_text)
        if "image" in self.attention:
            new_image, map_BHRT = self.attention["image"](image_BRW, text_BTW, text_BT, attentions)
            new_image = self.feed_forward["image"](new_image)
        return new_text, new_image, _named(text_to_image=map_BHTR, image_to_text=map_BHRT)


class EachReadsBoth(nn.Module):
    """Each stream attends to the other, then to itself, then thinks: LXMERT's cross-modality layer (arXiv 1908.07490,
    section 2.2). As there, one cross-attention serves both directions. A stream that nothing reads afterwards is left
    out of the last layer."""

    def __init__(self, width: int, heads: int, dropout: float, streams: frozenset[str]) -> None:
        super().__init__()
        self.cross_attention = AttentionLayer(width, heads, dropout)
        self.self_attention = nn.ModuleDict(
            {stream: AttentionLayer(width, heads, dropout) for stream in sorted(streams)}
        )
        self.feed_forward = nn.ModuleDict({stream: FeedForward(width, dropout) for stream in sorted(streams)})

    def forward(
        self, text_BTW: Tensor, text_BT: Tensor, image_BRW: Tensor, image_BR: Tensor, attentions: bool
    ) -> tuple[Tensor, Tensor, Maps]:
        """Both streams after this layer, and the maps by name."""
        new_text, new_image, map_BHTR, map_BHRT = text_BTW, image_BRW, None, None
        if "text" in self.self_attention:
            new_text, map_BHTR = self.cross_attention(text_BTW, image_BRW, image_BR, attentions)
            new_text, _ = self.self_attention["text"](new_text, new_text, text_BT)
            new_text = self.feed_forward["text"](new_text)
        if "image" in self.self_attention:
            new_image, map_BHRT = self.cross_attention(image_BRW, text_BTW, text_BT, attentions)
            new_image, _ = self.self_attention["image"](new_image, new_image, image_BR)
            new_image = self.feed_forward["image"](new_image)
        return new_text, new_image, _named(text_to_image=map_BHTR, image_to_text=map_BHRT)


def _named(**maps: Tensor | None) -> Maps:
    return {name: each for name, each in maps.items() if each is not None}


class TwoStream(nn.Module):
    """Layers of one kind between the encoders and the heads."""

    def __init__(
        self,
        layer: type[TextReadsImage | EachReadsOther | EachReadsBoth],
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
        both = frozenset({"text", "image"})
        last = frozenset({"image"} & reads) | frozenset({"text"} if {"text", "pooled"} & reads else ())
        self.layers = nn.ModuleList(
            layer(width, heads, dropout, last if number == layers - 1 else both) for number in range(layers)
        )
        self.pooler = Pooler(width) if "pooled" in reads else None

    def forward(self, image: Encoded, text: Encoded, *, attentions: bool = False) -> Fused:
        """Fused vectors, and the maps of each layer on request."""
        image, text = blanked(image), blanked(text)
        text_BT, image_BR = mask_of(text), mask_of(image)
        text_BTW, image_BRW = self.text_entrance(text.sequence_BTW), self.image_entrance(image.sequence_BTW)
        maps = defaultdict[str, tuple[Tensor, ...]](tuple)
        for layer in self.layers:
            text_BTW, image_BRW, found = layer(text_BTW, text_BT, image_BRW, image_BR, attentions)
            for name, each in found.items():
                maps[name] += (each,)
        return Fused(
            text_BTW if "text" in self.reads else None,
            image_BRW if "image" in self.reads else None,
            self.pooler(text_BTW) if self.pooler is not None else None,
            dict(maps) if attentions else None,
        )
