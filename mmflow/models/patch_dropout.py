"""Patch dropout (FLIP, arXiv 2212.00794): a training step reads a random part of each picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Shapes: B batch, T tokens, N patches, K patches kept, W width.


class PatchDropout(nn.Module):
    """Leaves patches out behind a ViT's embeddings, in training only; what stands before the patches (CLS) stays.

    Its own module, so that it follows the encoder's mode and not that of embeddings which may be frozen.
    """

    def __init__(self, share: float, prefix_tokens: int) -> None:
        super().__init__()
        self.share = share
        self.prefix_tokens = prefix_tokens

    def after(self, embeddings: nn.Module, args: tuple[Any, ...], tokens_BTW: Tensor) -> Tensor | None:
        """The forward hook of the embeddings: the tokens that are left, or None for as they are."""
        return self(tokens_BTW) if self.training and self.share else None

    def forward(self, tokens_BTW: Tensor) -> Tensor:
        """(B, prefix + K, W) with K = N (1 - share), at least one, in their order, drawn anew for each picture.

        The draw is of torch's generator on the tokens' device: the same state leaves out the same patches.
        """
        batch_size, num_tokens, width = tokens_BTW.shape
        num_patches = num_tokens - self.prefix_tokens
        kept = max(1, int(num_patches * (1 - self.share)))
        lots_BN = torch.rand(batch_size, num_patches, device=tokens_BTW.device)
        places_BK = lots_BN.topk(kept, dim=1).indices.sort(dim=1).values + self.prefix_tokens
        kept_BKW = tokens_BTW.gather(1, places_BK.unsqueeze(-1).expand(-1, -1, width))
        return torch.cat([tokens_BTW[:, : self.prefix_tokens], kept_BKW], dim=1)
