"""Clips of frames: one encoder for the three kinds of CLIP4Clip (arXiv 2104.08860, section 3.3), and the similarity of
its tight kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.attention import Blocks, pool_mean
from mmflow.models.config import VideoConfig
from mmflow.models.encoders import Encoded, ImageEncoder

# Shapes: B clips, F frames, W width, H and S height and width in pixels, R real frames of the batch, A captions. In
# the tight similarity: K = 1 + F vectors of a pair, P = A · B pairs, E width, I and T widths of the encoders' vectors.


class VideoEncoder(nn.Module):
    """An image encoder with frames in place of regions in its sequence."""

    def __init__(self, key: str, encoder: ImageEncoder, config: VideoConfig) -> None:
        super().__init__()
        self.key = key
        self.encoder = encoder
        self.width = encoder.width
        self.max_frames = config.max_frames
        self.order = None
        if config.kind == "sequential":
            self.order = Blocks(key, config, self.width, config.max_frames)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Clips (B, F, 3, H, S), or stills (B, 3, H, S), and which frames are real (B, F), None for all.

        The sequence has one vector per frame (B, F, W); for the sequential kind after the transformer, whose attention
        weights are (B, heads, F, F). The pooled vector is their mean. All real frames go through the image encoder in
        one batch, without padding, which a batch norm would count.
        """
        clips_BF3HS = inputs if inputs.dim() == 5 else inputs.unsqueeze(1)
        batch_size, num_frames = clips_BF3HS.shape[:2]
        if num_frames > self.max_frames:
            raise RecipeError(f"{self.key}.max_frames: {self.max_frames}, but a clip has {num_frames}; raise it")
        mask_BF = torch.ones(batch_size, num_frames, dtype=torch.bool, device=inputs.device)
        if mask is None:
            frames_RW = self.encoder(clips_BF3HS.flatten(0, 1)).pooled_BW
            frames_BFW = frames_RW.unflatten(0, (batch_size, num_frames))
        else:
            mask_BF = mask.bool()
            # A clip without frames (a padded row of the batch) is read as its first frame: attention to nothing is NaN.
            first_F = torch.arange(num_frames, device=mask.device) == 0
            mask_BF = mask_BF | (first_F & ~mask_BF.any(1, keepdim=True))
            frames_RW = self.encoder(clips_BF3HS[mask_BF]).pooled_BW
            frames_BFW = frames_RW.new_zeros(batch_size, num_frames, self.width)
            frames_BFW = frames_BFW.masked_scatter(mask_BF.unsqueeze(-1), frames_RW)
        weights = None
        if self.order is not None:
            ordered_BFW, weights = self.order(frames_BFW, mask_BF, maps=attentions)
            frames_BFW = frames_BFW + ordered_BFW
        return Encoded(frames_BFW, pool_mean(frames_BFW, mask_BF), mask_BF, weights)


ImageTower = ImageEncoder | VideoEncoder


class TightSimilarity(nn.Module):
    """CLIP4Clip's tight similarity: a transformer reads a caption and a clip's frames together and scores the pair.

    U = [w, z₁ … z_F], s = FC(ReLU(FC(Transformer(U + P + T)[0]))), with P the positions and T the two types. Neither
    side has a vector that could be kept: every caption with every clip is a forward pass.
    """

    def __init__(self, key: str, config: VideoConfig, width: int, *, image_width: int, text_width: int) -> None:
        """`key` is the recipe's key of `config`. Raises RecipeError if the heads do not divide the width."""
        super().__init__()
        self.image_projection = nn.Linear(image_width, width, bias=False)
        self.text_projection = nn.Linear(text_width, width, bias=False)
        self.types = nn.Embedding(2, width)
        nn.init.normal_(self.types.weight, std=0.02)
        self.read = Blocks(key, config, width, 1 + config.max_frames)
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, captions_AT: Tensor, frames_BFI: Tensor, mask_BF: Tensor) -> Tensor:
        """The score of each caption with each clip, (A, B), from A · B sequences of 1 + F vectors.

        `captions_AT` are pooled vectors; `mask_BF` is True where a frame is real, and each clip has at least one.
        """
        num_captions, num_clips = len(captions_AT), len(frames_BFI)
        types_2E = self.types(torch.arange(2, device=frames_BFI.device))
        captions_AE = self.text_projection(captions_AT) + types_2E[0]
        frames_BFE = self.image_projection(frames_BFI) + types_2E[1]
        captions_AB1E = captions_AE[:, None, None].expand(-1, num_clips, -1, -1)
        frames_ABFE = frames_BFE[None].expand(num_captions, -1, -1, -1)
        pairs_PKE = torch.cat([captions_AB1E, frames_ABFE], 2).flatten(0, 1)
        mask_BK = torch.cat([torch.ones_like(mask_BF[:, :1]), mask_BF], 1)
        read_PKE, _ = self.read(pairs_PKE, mask_BK.repeat(num_captions, 1))
        scores_AB: Tensor = self.score(read_PKE[:, 0]).view(num_captions, num_clips)
        return scores_AB
