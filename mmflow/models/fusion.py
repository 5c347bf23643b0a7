"""The kinds of fusion, in one table: by attention between two streams, by attention in one joint stream, and by mixing
vectors without attention.

The layers by attention are post-norm as in BERT (arXiv 1706.03762, section 3.1), like those of UNITER, VisualBERT,
ViLBERT, LXMERT, ALBEF and BLIP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.attention import Attention, Read
from mmflow.models.config import FusionConfig
from mmflow.models.encoders import Encoded, Fused

# Shapes: B batch, Q places that read, K places that are read, T tokens, R regions, L places of either or of both, W
# width of the fusion, M width of an encoder, H heads.

LAYER_NORM_EPS = 1e-12  # BERT's, and that of every model with weights that fit these layers

Maps = dict[str, Tensor]


class AttentionLayer(nn.Module):
    """x ← LayerNorm(x + Dropout(attention of x to c)); with c = x it is self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x_BQW: Tensor, context_BKW: Tensor, mask_BK: Tensor, maps: bool = False) -> Read:
        """The places after they read the context where `mask_BK` (bool) is True. A row with nothing to read keeps what
        it has, and its map is zeros."""
        readable_B1 = mask_BK.any(1, keepdim=True)
        # A softmax over nothing is NaN, and so is its gradient: such a row reads everything, and the result is dropped.
        read_BQW, map_BHQK = self.attention(x_BQW, context_BKW, mask_BK | ~readable_B1, maps=maps)
        x_BQW = self.norm(x_BQW + self.dropout(read_BQW.masked_fill(~readable_B1[..., None], 0.0)))
        if map_BHQK is not None and not bool(readable_B1.all()):
            # Only where needed: the filled copy is not on the way to the output and gets no gradient.
            map_BHQK = map_BHQK.masked_fill(~readable_B1[..., None, None], 0.0)
        return x_BQW, map_BHQK


class FeedForward(nn.Module):
    """x ← LayerNorm(x + Dropout(V · GELU(U x))), four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.output = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x_BLW: Tensor) -> Tensor:
        """(…, W) → (…, W)."""
        y: Tensor = self.norm(x_BLW + self.dropout(self.output(nn.functional.gelu(self.inner(x_BLW)))))
        return y


class Entrance(nn.Module):
    """An encoder's sequence in the width of the fusion: Dropout(LayerNorm(A x + a)). Each side has its own; the bias
    distinguishes the sides as a segment embedding would."""

    def __init__(self, encoder_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(encoder_width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequence_BLM: Tensor) -> Tensor:
        """(B, L, M) → (B, L, W)."""
        entered: Tensor = self.dropout(self.norm(self.projection(sequence_BLM)))
        return entered


class Pooler(nn.Module):
    """tanh(A x₀ + a) of the text's first token (BERT, arXiv 1810.04805, section 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, text_BTW: Tensor) -> Tensor:
        """(B, T, W) → (B, W)."""
        pooled: Tensor = self.dense(text_BTW[:, 0]).tanh()
        return pooled


class CrossLayer(nn.Module):
    """A layer of two streams that read each other. Each kind defines one stream's `step`; a stream that is not in
    `streams` does not change: the last layer leaves out what nothing reads afterwards."""

    def __init__(self, streams: frozenset[str]) -> None:
        super().__init__()
        self.streams = streams

    def step(self, stream: str, x_BQW: Tensor, mask_BQ: Tensor, other_BKW: Tensor, mask_BK: Tensor, maps: bool) -> Read:
        """The stream after this layer, and on request its map of the other."""
        raise NotImplementedError

    def forward(
        self, text_BTW: Tensor, mask_BT: Tensor, image_BRW: Tensor, mask_BR: Tensor, attentions: bool
    ) -> tuple[Tensor, Tensor, Maps]:
        """Both streams after this layer, and on request the maps by name."""
        new_text, new_image, map_BHTR, map_BHRT = text_BTW, image_BRW, None, None
        if "text" in self.streams:
            new_text, map_BHTR = self.step("text", text_BTW, mask_BT, image_BRW, mask_BR, attentions)
        if "image" in self.streams:
            new_image, map_BHRT = self.step("image", image_BRW, mask_BR, text_BTW, mask_BT, attentions)
        maps = {"text_to_image": map_BHTR, "image_to_text": map_BHRT}
        return new_text, new_image, {name: map_BHQK for name, map_BHQK in maps.items() if map_BHQK is not None}


class TextReadsImage(CrossLayer):
    """Text attends to itself, then to the image, then goes through a feed-forward net (ALBEF's multimodal encoder,
    arXiv 2107.07651, section 3.1; BLIP's image-grounded text encoder, arXiv 2201.12086). The image does not change."""

    def __init__(self, width: int, heads: int, dropout: float, streams: frozenset[str]) -> None:
        super().__init__(frozenset({"text"}))
        self.self_attention = AttentionLayer(width, heads, dropout)
        self.cross_attention = AttentionLayer(width, heads, dropout)
        self.feed_forward = FeedForward(width, dropout)

    def step(self, stream: str, x_BQW: Tensor, mask_BQ: Tensor, other_BKW: Tensor, mask_BK: Tensor, maps: bool) -> Read:
        x_BQW, _ = self.self_attention(x_BQW, x_BQW, mask_BQ)
        x_BQW, map_BHQK = self.cross_attention(x_BQW, other_BKW, mask_BK, maps)
        return self.feed_forward(x_BQW), map_BHQK


class EachReadsOther(CrossLayer):
    """Each stream attends to the other, then goes through a feed-forward net: ViLBERT's co-attentional layer (arXiv
    1908.02265, section 2.2 and figure 2b)."""

    def __init__(self, width: int, heads: int, dropout: float, streams: frozenset[str]) -> None:
        super().__init__(streams)
        self.attention = nn.ModuleDict({stream: AttentionLayer(width, heads, dropout) for stream in sorted(streams)})
        self.feed_forward = nn.ModuleDict({stream: FeedForward(width, dropout) for stream in sorted(streams)})

    def step(self, stream: str, x_BQW: Tensor, mask_BQ: Tensor, other_BKW: Tensor, mask_BK: Tensor, maps: bool) -> Read:
        x_BQW, map_BHQK = self.attention[stream](x_BQW, other_BKW, mask_BK, maps)
        return self.feed_forward[stream](x_BQW), map_BHQK


class EachReadsBoth(CrossLayer):
    """Each stream attends to the other, then to itself, then goes through a feed-forward net: LXMERT's cross-modality
    layer (arXiv 1908.07490, section 2.2). As there, one cross-attention serves both directions."""

    def __init__(self, width: int, heads: int, dropout: float, streams: frozenset[str]) -> None:
        super().__init__(streams)
        names = sorted(streams)
        self.cross_attention = AttentionLayer(width, heads, dropout)
        self.self_attention = nn.ModuleDict({stream: AttentionLayer(width, heads, dropout) for stream in names})
        self.feed_forward = nn.ModuleDict({stream: FeedForward(width, dropout) for stream in names})

    def step(self, stream: str, x_BQW: Tensor, mask_BQ: Tensor, other_BKW: Tensor, mask_BK: Tensor, maps: bool) -> Read:
        x_BQW, map_BHQK = self.cross_attention(x_BQW, other_BKW, mask_BK, maps)
        x_BQW, _ = self.self_attention[stream](x_BQW, x_BQW, mask_BQ)
        return self.feed_forward[stream](x_BQW), map_BHQK


class JointLayer(nn.Module):
    """A layer of BERT (arXiv 1810.04805) over text and image in one sequence, in which every place reads every other
    (UNITER, arXiv 1909.11740, section 3.1; VisualBERT, arXiv 1908.03557, section 3.2)."""

    def __init__(self, width: int, heads: int, dropout: float, streams: frozenset[str]) -> None:
        super().__init__()
        self.attention = AttentionLayer(width, heads, dropout)
        self.feed_forward = FeedForward(width, dropout)

    def forward(
        self, text_BTW: Tensor, mask_BT: Tensor, image_BRW: Tensor, mask_BR: Tensor, attentions: bool
    ) -> tuple[Tensor, Tensor, Maps]:
        """Text and image after this layer, and on request the map of the sequence and its two crossing parts."""
        num_tokens = mask_BT.shape[1]
        x_BLW = torch.cat([text_BTW, image_BRW], 1)
        x_BLW, map_BHLL = self.attention(x_BLW, x_BLW, torch.cat([mask_BT, mask_BR], 1), attentions)
        x_BLW, maps = self.feed_forward(x_BLW), Maps()
        if map_BHLL is not None:
            maps["joint"] = map_BHLL
            maps["text_to_image"] = map_BHLL[:, :, :num_tokens, num_tokens:]
            maps["image_to_text"] = map_BHLL[:, :, num_tokens:, :num_tokens]
        return x_BLW[:, :num_tokens], x_BLW[:, num_tokens:], maps


class Streams(nn.Module):
    """Layers of one kind between the encoders and the heads; `reads` is what the heads read."""

    def __init__(
        self,
        layer: Callable[[int, int, float, frozenset[str]], nn.Module],
        config: FusionConfig,
        text_width: int,
        image_width: int,
        reads: frozenset[str],
    ) -> None:
        super().__init__()
        self.reads = reads
        self.text_entrance = Entrance(text_width, config.width, config.dropout)
        self.image_entrance = Entrance(image_width, config.width, config.dropout)
        num_layers, heads = config.layers or 0, config.heads or 0  # FusionConfig requires both
        last = (reads & {"image"}) | ({"text"} if reads & {"text", "pooled"} else set())
        streams = [frozenset({"text", "image"})] * (num_layers - 1) + [frozenset(last)]
        self.layers = nn.ModuleList(layer(config.width, heads, config.dropout, names) for names in streams)
        self.pooler = Pooler(config.width) if "pooled" in reads else None

    def forward(self, image: Encoded, text: Encoded, *, attentions: bool = False) -> Fused:
        """Fused vectors, and on request the maps of each layer."""
        (text_BTM, _, mask_BT), (image_BRM, _, mask_BR) = text.blanked(), image.blanked()
        text_BTW, image_BRW = self.text_entrance(text_BTM), self.image_entrance(image_BRM)
        all_maps = defaultdict[str, tuple[Tensor, ...]](tuple)
        for layer in self.layers:
            text_BTW, image_BRW, maps = layer(text_BTW, mask_BT, image_BRW, mask_BR, attentions)
            for name, map_BHQK in maps.items():
                all_maps[name] += (map_BHQK,)
        return Fused(
            text_BTW if "text" in self.reads else None,
            image_BRW if "image" in self.reads else None,
            self.pooler(text_BTW) if self.pooler is not None else None,
            dict(all_maps) if attentions else None,
        )


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
