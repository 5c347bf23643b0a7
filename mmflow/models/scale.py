"""What cosines are scaled and shifted by before a loss sees them: a module of its own, so that ZeRO-3, which gathers a
module's parameters for its forward alone, finds them whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp: a sharper temperature makes the loss unstable


class Scale(NamedTuple):
    """logits = logit_scale · cosine + logit_bias; both (1,), fp32."""

    logit_scale: Tensor
    logit_bias: Tensor | None


class LogitScale(nn.Module):
    """CLIP's learned temperature (arXiv 2103.00020, section 2.3) and, for SigLIP (arXiv 2303.15343, section 3.2), its
    learned bias. Both parameters are of shape (1,), not (): ZeRO cannot partition one without a dimension."""

    def __init__(self, temperature: float, bias: float | None = None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))

    def forward(self) -> Scale:
        """The scale, and the bias where there is one. Without a bias the scale is at most 100; SigLIP has no such
        bound, and the scales that were released with it reach 118."""
        if self.logit_bias is not None:
            # A sum, because the parameter itself is a piece as soon as ZeRO-3 lets go of it.
            return Scale(self.logit_scale.exp(), self.logit_bias + 0.0)
        # The clamped value with the raw one's gradient: a plain clamp has none past its bound, and would never let the
        # scale come back.
        over = (self.logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        return Scale((self.logit_scale - over).exp(), None)
