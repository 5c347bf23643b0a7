"""Clips: frames through the image encoder, then made one as CLIP4Clip does (arXiv 2104.08860, section 3.3).

Its third way, which keeps the frames apart until it reads them with a caption, is in `tight`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.attention import Blocks
from mmflow.models.config import VideoConfig
from mmflow.models.encoders import Encoded, ImageEncoder
from mmflow.models.pooling import pool_mean

# Shapes: B clips, F frames, W width, H and S height and width in pixels, R real frames of the batch, A captions.


class VideoEncoder(nn.Module):
    """An image encoder whose sequence is not regions but frames."""

    def __init__(self, key: str, encoder: ImageEncoder, config: VideoConfig) -> None:
        super().__init__()
        self.key = key
        self.encoder = encoder
        self.width = encoder.width
        self.max_frames = config.max_frames
        self.order = None
        if config.kind == "sequential":
            assert config.layers is not None
            assert config.heads is not None
            check_heads(key, config.heads, self.width)
            self.order = Blocks(self.width, config.heads, config.layers, config.max_frames)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Clips (B, F, 3, H, S), or stills (B, 3, H, S), and which frames are real (B, F), None for all.

        The sequence is one vector a frame (B, F, W), after the transformer where the kind is sequential, which gives
        the attentions (B, heads, F, F); pooled is their mean. All real frames go through the image encoder in one
        batch, and those alone: padding in it would count in a batch norm.
        """
        clips_BF3HS = inputs if inputs.dim() == 5 else inputs.unsqueeze(1)
        batch_size, num_frames = clips_BF3HS.shape[:2]
        if num_frames > self.max_frames:
            raise RecipeError(f"{self.key}.max_frames: {self.max_frames}, and a clip has {num_frames}; raise it")
        mask_BF = _at_least_one(mask, clips_BF3HS)
        if mask is None:
            frames_RW = self.encoder(clips_BF3HS.flatten(0, 1)).pooled_BW
            frames_BFW = frames_RW.unflatten(0, (batch_size, num_frames))
        else:
            frames_RW = self.encoder(clips_BF3HS[mask_BF]).pooled_BW
            frames_BFW = frames_RW.new_zeros(batch_size, num_frames, self.width)
            frames_BFW = frames_BFW.masked_scatter(mask_BF.unsqueeze(-1), frames_RW)
        weights = None
        if self.order is not None:
            ordered_BFW, weights = self.order(frames_BFW, mask_BF, maps=attentions)
            frames_BFW = frames_BFW + ordered_BFW
        return Encoded(frames_BFW, pool_mean(frames_BFW, mask_BF), mask_BF, weights)


def _at_least_one(mask_BF: Tensor | None, clips_BF: Tensor) -> Tensor:
    # A clip of no frames (a padded row of the batch) is read as its first: attention to nothing is not a number.
    if mask_BF is None:
        return torch.ones(clips_BF.shape[:2], dtype=torch.bool, device=clips_BF.device)
    mask_BF = mask_BF.bool()
    first_F = torch.arange(mask_BF.shape[1], device=mask_BF.device) == 0
    return mask_BF | (first_F & ~mask_BF.any(1, keepdim=True))


def check_heads(key: str, heads: int, width: int) -> None:
    """Raise RecipeError where the heads do not divide the width. `key` is the recipe's."""
    if width % heads:
        raise RecipeError(f"{key}.heads: {heads} do not divide the width, {width}; give another number")
