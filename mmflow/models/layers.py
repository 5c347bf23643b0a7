"""The pieces that fusions are stacked from: attention and feed-forward, each with its residual and norm as in BERT, a
way in and a way out."""

from __future__ import annotations

from torch import Tensor, nn

from mmflow.models.attention import Attention

# Shapes: B batch, Q places that read, K places that are read, L or T places, W width, M width of an encoder, H heads.

LAYER_NORM_EPS = 1e-12  # BERT's, and that of every model whose weights fit these layers


class AttentionLayer(nn.Module):
    """x ← LayerNorm(x + Dropout(attention of x to c)), the post-norm layer (arXiv 1706.03762, section 3.1) that UNITER,
    VisualBERT, ViLBERT, LXMERT and ALBEF share. With c = x it is self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(
        self, x_BQW: Tensor, context_BKW: Tensor, mask_BK: Tensor, attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The places after they read the context where `mask_BK` (bool) is True, and the map (B, H, Q, K) on request.

        A row that has nothing to read keeps what it has, and its map is zeros.
        """
        readable_B1 = mask_BK.any(1, keepdim=True)
        # A softmax over nothing is NaN, and so is its gradient: such a row reads everything, and what it read is
        # thrown away.
        read_BQW, map_BHQK = self.attention(x_BQW, context_BKW, mask_BK | ~readable_B1, maps=attentions)
        x_BQW = self.norm(x_BQW + self.dropout(read_BQW.masked_fill(~readable_B1[..., None], 0.0)))
        if map_BHQK is not None and not bool(readable_B1.all()):
            # Only then: the filled copy is not on the way to what was read, and has no gradient to be explained by.
            map_BHQK = map_BHQK.masked_fill(~readable_B1[..., None, None], 0.0)
        return x_BQW, map_BHQK


class FeedForward(nn.Module):
    """x ← LayerNorm(x + Dropout(V · GELU(U x))), four times as wide within."""

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
    """An encoder's sequence in the width of the fusion: Dropout(LayerNorm(A x + a)). Each side has its own, whose bias
    tells it from the other as a segment embedding would."""

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
