"""Masked image modelling (SimMIM, arXiv 2111.09886, eq. 1).

    loss = ‖y_M − x_M‖₁ / Ω(x_M),   x the pixels, y the predicted ones, M the hidden ones

Hidden squares are grey, where SimMIM puts a learned vector: the embedding of a grey patch is the learned bias of the
patch projection, and any encoder can read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmflow.learning import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs

# Shapes: B rows of this rank, S side of an image in pixels, Q squares, P patches of the head and L values in each.


class MaskedImage(Objective):
    """Predict hidden squares of the image from the rest and, with a fusion, from the caption."""

    share: float = Field(0.6, gt=0, lt=1)
    """Share of the squares that are hidden."""
    square_pixels: int = Field(32, ge=1)
    """Side of a square; SimMIM found 32 best for images of 192 and 224 pixels."""

    TRAINS: ClassVar = {"masked_image": {}}

    def needs(self) -> dict[str, str]:
        return {"masked_image_pixels": "add masked_image to the model's heads"}

    def places(self, outputs: Outputs) -> Tensor:
        """(B, P, L) bool: the values to predict."""
        return self._in_patches(self._hidden(outputs), outputs)

    def loss(self, outputs: Outputs) -> Tensor:
        from mmflow.learning.rows import mean_of
        from mmflow.models.heads import patches

        model, pixels_B3SS = outputs.model, outputs.pixels
        hidden_B1SS = self._hidden(outputs)
        # 0 is the mean colour of normalised pixels.
        seen = model.encode_image(pixels_B3SS.masked_fill(hidden_B1SS, 0.0), outputs.frame_mask)
        predicted_BPL = model.masked_image_pixels(model.fuse(seen, outputs.text))
        hidden_BPL = self._in_patches(hidden_B1SS, outputs)
        error_BPL = (predicted_BPL.float() - patches(pixels_B3SS, _patch_side(outputs)).float()).abs()
        return mean_of(error_BPL[hidden_BPL], outputs.gather_places("masked_image"))

    def _hidden(self, outputs: Outputs) -> Tensor:
        side = outputs.pixels.shape[-1]
        uniform_BQ = outputs.draw_uniform(num_squares(side, self.square_pixels))
        return hidden_squares(side, self.square_pixels, self.share, uniform_BQ)

    def _in_patches(self, hidden_B1SS: Tensor, outputs: Outputs) -> Tensor:
        from mmflow.models.heads import patches

        hidden_BPL = patches(hidden_B1SS.expand_as(outputs.pixels), _patch_side(outputs))
        return hidden_BPL & outputs.rows.real_B[:, None, None]


def _patch_side(outputs: Outputs) -> int:
    return int(outputs.model.heads["masked_image"].side)  # type: ignore[arg-type]


def num_squares(image_pixels: int, square_pixels: int) -> int:
    """How many squares cover an image; the last of a row or column may be cut off."""
    return int(-(-image_pixels // square_pixels)) ** 2


def hidden_squares(image_pixels: int, square_pixels: int, share: float, uniform_BQ: Tensor) -> Tensor:
    """(B, 1, S, S) bool: the same number of squares in every image, at least one, and not all if there are several."""
    squares = uniform_BQ.shape[1]
    across = -(-image_pixels // square_pixels)
    order_BQ = uniform_BQ.argsort(1).argsort(1)
    hidden_BQ = order_BQ < max(1, min(round(share * squares), squares - 1))
    hidden_B1 = hidden_BQ.view(-1, 1, across, across)
    hidden_B1 = hidden_B1.repeat_interleave(square_pixels, 2).repeat_interleave(square_pixels, 3)
    return hidden_B1[..., :image_pixels, :image_pixels]
