"""Masked image modelling (SimMIM, arXiv 2111.09886, eq. 1).

    loss = ‖y_M − x_M‖₁ / Ω(x_M),   x the pixels, y those painted, M what was hidden

Hidden squares are grey rather than SimMIM's learned vector: a grey patch's embedding is the learned bias of the patch
projection, and any encoder can read it.
"""

from __future__ import annotations

from torch import Tensor

from mmflow.learning.chance import draw_seed, uniform
from mmflow.learning.config import MaskedImageConfig
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import mean_of
from mmflow.models.heads import patches

# Shapes: B rows of this rank, S side of a picture in pixels, Q squares, P patches of the head and L pixels in each.


def masked_image(outputs: Outputs, config: MaskedImageConfig) -> Tensor:
    """The objective of a batch, (); with a fusion the caption helps to paint."""
    model, pixels_B3SS = outputs.model, outputs.pixels
    hidden_B1SS = _hidden(outputs, config)
    # 0 is the mean colour of normalised pixels.
    seen = model.encode_image(pixels_B3SS.masked_fill(hidden_B1SS, 0.0), outputs.frame_mask)
    painted_BPL = model.masked_image_pixels(model.fuse(seen, outputs.text))
    hidden_BPL = _in_patches(hidden_B1SS, outputs)
    error_BPL = (painted_BPL.float() - patches(pixels_B3SS, _side(outputs)).float()).abs()
    return mean_of(error_BPL[hidden_BPL], outputs.gather_places("masked_image"))


def masked_image_places(outputs: Outputs, config: MaskedImageConfig) -> Tensor:
    """(B, P, L) bool: the pixels to be painted."""
    return _in_patches(_hidden(outputs, config), outputs)


def _hidden(outputs: Outputs, config: MaskedImageConfig) -> Tensor:
    seed = draw_seed(outputs.generator)
    side = outputs.pixels.shape[-1]
    return hidden_squares(side, config.square_pixels, config.share, outputs.rows.columns_B, seed)


def _in_patches(hidden_B1SS: Tensor, outputs: Outputs) -> Tensor:
    hidden_BPL = patches(hidden_B1SS.expand_as(outputs.pixels), _side(outputs))
    return hidden_BPL & outputs.rows.real_B[:, None, None]


def _side(outputs: Outputs) -> int:
    return int(outputs.model.heads["masked_image"].side)  # type: ignore[arg-type]


def hidden_squares(image_pixels: int, square_pixels: int, share: float, rows_B: Tensor, seed: int) -> Tensor:
    """(B, 1, S, S) bool: the same number of squares in every picture, at least one, and not all where there are more.

    Which ones depends on the seed and the row's number in the global batch alone.
    """
    across = -(-image_pixels // square_pixels)
    order_BQ = uniform(seed, rows_B, across**2).argsort(1).argsort(1)
    hidden_BQ = order_BQ < max(1, min(round(share * across**2), across**2 - 1))
    hidden_B1 = hidden_BQ.view(-1, 1, across, across)
    hidden_B1 = hidden_B1.repeat_interleave(square_pixels, 2).repeat_interleave(square_pixels, 3)
    return hidden_B1[..., :image_pixels, :image_pixels]
