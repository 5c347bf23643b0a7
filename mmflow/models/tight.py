"""CLIP4Clip's tight similarity (arXiv 2104.08860, section 3.3): a transformer reads a caption and a clip's frames
together and scores the pair. No vector of either side can be kept: each caption meets each clip anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.models.attention import Blocks
from mmflow.models.video import check_heads

# Shapes: A captions, B clips, F frames, K = 1 + F vectors of a pair, P = A · B pairs, E width, I and T the widths of
# what the image and the text encoder give.


class TightSimilarity(nn.Module):
    """U = [w, z₁ … z_F], s = FC(ReLU(FC(Transformer(U + P + T)[0]))), with P the positions and T the two types."""

    def __init__(
        self, key: str, width: int, *, image_width: int, text_width: int, layers: int, heads: int, max_frames: int
    ) -> None:
        """`key` is the recipe's, for errors. Raises RecipeError where the heads do not divide the width."""
        super().__init__()
        check_heads(key, heads, width)
        self.image_projection = nn.Linear(image_width, width, bias=False)
        self.text_projection = nn.Linear(text_width, width, bias=False)
        self.types = nn.Embedding(2, width)
        nn.init.normal_(self.types.weight, std=0.02)
        self.read = Blocks(width, heads, layers, 1 + max_frames)
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, captions_AT: Tensor, frames_BFI: Tensor, mask_BF: Tensor) -> Tensor:
        """The score of each caption with each clip, (A, B): A · B sequences of 1 + F vectors.

        `captions_AT` are pooled; `mask_BF` is True where a frame is real, and each clip has one at least.
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
