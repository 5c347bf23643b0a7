"""Clips: frames through the image encoder, then made one as CLIP4Clip does (arXiv 2104.08860, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.errors import RecipeError
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
            _check_heads(key, config, self.width)
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


class TightSimilarity(nn.Module):
    """A transformer that reads a caption and a clip's frames together and gives the pair a score (the tight type of
    CLIP4Clip, equations 5 to 7): U = [w, z₁ … z_F], s = FC(ReLU(FC(Transformer(U + P + T)[0])))."""

    def __init__(self, key: str, width: int, config: VideoConfig) -> None:
        super().__init__()
        _check_heads(key, config, width)
        self.types = nn.Embedding(2, width)
        nn.init.normal_(self.types.weight, std=0.02)
        self.read = Blocks(width, config.heads, config.layers, 1 + config.max_frames)
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, captions_AW: Tensor, frames_BFW: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """The score of each caption with each clip (A, B), from both in one width: A · B sequences of 1 + F vectors."""
        num_captions, num_clips = len(captions_AW), len(frames_BFW)
        mask_BF = _at_least_one(mask_BF, frames_BFW)
        types_2W = self.types(torch.arange(2, device=frames_BFW.device))
        captions_AB1W = (captions_AW + types_2W[0])[:, None, None].expand(-1, num_clips, -1, -1)
        frames_ABFW = (frames_BFW + types_2W[1])[None].expand(num_captions, -1, -1, -1)
        pairs_PKW = torch.cat([captions_AB1W, frames_ABFW], 2).flatten(0, 1)
        mask_BK = torch.cat([torch.ones_like(mask_BF[:, :1]), mask_BF], 1)
        read_PKW, _ = self.read(pairs_PKW, mask_BK.repeat(num_captions, 1))
        scores_AB: Tensor = self.score(read_PKW[:, 0]).view(num_captions, num_clips)
        return scores_AB


def _at_least_one(mask_BF: Tensor | None, clips_BF: Tensor) -> Tensor:
    # A clip of no frames (a padded row of the batch) is read as its first: attention to nothing is not a number.
    if mask_BF is None:
        return torch.ones(clips_BF.shape[:2], dtype=torch.bool, device=clips_BF.device)
    mask_BF = mask_BF.bool()
    first_F = torch.arange(mask_BF.shape[1], device=mask_BF.device) == 0
    return mask_BF | (first_F & ~mask_BF.any(1, keepdim=True))


def _check_heads(key: str, config: VideoConfig, width: int) -> None:
    if width % config.heads:
        raise RecipeError(f"{key}.heads: {config.heads} do not divide the width, {width}; give another number")
