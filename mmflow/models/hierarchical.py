"""Documents of thousands of tokens: an encoder reads them window by window, a small transformer reads the windows'
vectors (HIBERT, arXiv 1905.06566, section 3.1; ToBERT, arXiv 1910.10781, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmflow.core.errors import RecipeError
from mmflow.models.attention import Blocks
from mmflow.models.config import WindowsConfig
from mmflow.models.encoders import Encoded, TextEncoder
from mmflow.models.pooling import pool_mean

# Shapes: B documents, T tokens, N windows, W width, C tokens of a window, R documents that have a given window.


class HierarchicalEncoder(nn.Module):
    """A text encoder whose sequence is not tokens but windows.

    Each window is the document's opening token and the next C - 1 tokens. The windows are read one after the other, and
    in training each is computed again in the backward pass: beside one vector a window, memory holds one window of the
    batch, however long the documents are.
    """

    def __init__(self, key: str, encoder: TextEncoder, config: WindowsConfig, max_tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = encoder.width
        if self.width % config.heads:
            raise RecipeError(f"{key}.windows.heads: {config.heads} do not divide the encoder's width, {self.width}")
        self.fresh_tokens = config.tokens - 1
        self.num_windows = max(1, -(-(max_tokens - 1) // self.fresh_tokens))
        self.windows = Blocks(self.width, config.heads, config.layers, self.num_windows)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Token ids (B, T) to one vector a window: sequence (B, N, W), its mean, the mask of windows (B, N), and where
        asked each layer's weights among windows (B, heads, N, N). N follows from `max_tokens`, not from the batch.

        The encoder is called N times, also for windows that no document has, which are then a single token: ZeRO-3
        gathers weights in each call, and ranks whose documents differ in length must make the same calls.
        """
        mask_BT = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask.bool()
        windows = [self._window(inputs, mask_BT, number) for number in range(self.num_windows)]
        vectors_BNW = torch.stack([vector_BW for vector_BW, _ in windows], 1)
        mask_BN = torch.stack([has_B for _, has_B in windows], 1)
        sequence_BNW, weights = self.windows(vectors_BNW, mask_BN, maps=attentions)
        return Encoded(sequence_BNW, pool_mean(sequence_BNW, mask_BN), mask_BN, weights)

    def _window(self, ids_BT: Tensor, mask_BT: Tensor, number: int) -> tuple[Tensor, Tensor]:
        start = 1 + number * self.fresh_tokens
        ids_BC = torch.cat([ids_BT[:, :1], ids_BT[:, start : start + self.fresh_tokens]], 1)
        mask_BC = torch.cat([torch.ones_like(mask_BT[:, :1]), mask_BT[:, start : start + self.fresh_tokens]], 1)
        # The first window stands for a document without tokens too: a row must have something to attend to.
        has_B = mask_BC[:, 1:].any(1) if number else torch.ones_like(mask_BT[:, 0])
        rows_R = has_B.nonzero()[:, 0]
        if len(rows_R):
            longest = int(mask_BC[rows_R].any(0).nonzero().max()) + 1
            ids_RC, mask_RC = ids_BC[rows_R, :longest], mask_BC[rows_R, :longest]
        else:
            rows_R = has_B.new_zeros(1, dtype=torch.int64)
            ids_RC, mask_RC = ids_BC[:1, :1], mask_BC[:1, :1]
        if torch.is_grad_enabled():
            read_RW = checkpoint(self._read, ids_RC, mask_RC, use_reentrant=False)
        else:
            read_RW = self._read(ids_RC, mask_RC)
        return read_RW.new_zeros(len(ids_BT), self.width).index_copy(0, rows_R, read_RW), has_B

    def _read(self, ids_RC: Tensor, mask_RC: Tensor) -> Tensor:
        pooled_RW: Tensor = self.encoder(ids_RC, mask_RC).pooled_BW
        return pooled_RW
