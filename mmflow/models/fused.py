"""What every fusion takes and gives, and how a missing modality is kept out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmflow.models.encoders import Encoded

# Shapes: B batch, T tokens, R regions of the picture, W width, H heads.


class Fused(NamedTuple):
    """Image and text after they read each other; None for what no head of the model reads."""

    text_BTW: Tensor | None
    image_BRW: Tensor | None
    pooled_BW: Tensor | None
    attentions: Mapping[str, tuple[Tensor, ...]] | None
    """On request, a map a layer: text_to_image (B, H, T, R), image_to_text (B, H, R, T), and of a single stream joint
    (B, H, T+R, T+R), text first. A row that reads is a distribution over what is read; 0 where nothing could be."""


def absent(encoded: Encoded, missing_B: Tensor) -> Encoded:
    """The same rows with those of `missing_B` (bool) masked out: their contents then change nothing in a fusion."""
    return encoded._replace(mask_BT=mask_of(encoded) & ~missing_B[:, None])


def mask_of(encoded: Encoded) -> Tensor:
    """(B, T) bool, True where there is something."""
    if encoded.mask_BT is not None:
        return encoded.mask_BT
    return torch.ones(encoded.sequence_BTW.shape[:2], dtype=torch.bool, device=encoded.sequence_BTW.device)


def blanked(encoded: Encoded) -> Encoded:
    """Zeros where the mask is False, and a pooled vector of zeros where it is so for the whole row.

    Masking the keys of attention is not enough: the masked token's own vector goes on as a query, and a row's first
    token is what is pooled. Filled rather than multiplied, because 0 · NaN is NaN.
    """
    mask_BT = mask_of(encoded)
    return encoded._replace(
        sequence_BTW=encoded.sequence_BTW.masked_fill(~mask_BT[..., None], 0.0),
        pooled_BW=encoded.pooled_BW.masked_fill(~mask_BT.any(1, keepdim=True), 0.0),
        mask_BT=mask_BT,
    )
