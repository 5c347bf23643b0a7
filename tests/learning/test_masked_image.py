"""Squares are hidden alike in every picture, and the loss over them is that of transformers' SimMIM head."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmflow.learning.objectives.masked_image import MaskedImage, hidden_squares, num_squares
from mmflow.learning.rows import uniform
from tests.learning.tiny import PATCH, SIDE, TinyModel, batch, gradients, outputs_of, rows_of


def squares_of(pixels: int, square: int, share: float, rows: torch.Tensor, seed: int) -> torch.Tensor:
    return hidden_squares(pixels, square, share, uniform(seed, rows, num_squares(pixels, square)))


@given(
    pixels=st.integers(4, 40),
    square=st.integers(1, 40),
    share=st.floats(0.01, 0.99),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_as_many_whole_squares_are_hidden_in_every_picture(
    pixels: int, square: int, share: float, rows: int, seed: int
) -> None:
    hidden = squares_of(pixels, square, share, torch.arange(rows), seed)
    across = -(-pixels // square)
    assert hidden.shape == (rows, 1, pixels, pixels)
    corners = hidden[:, 0, ::square, ::square]
    assert (corners.flatten(1).sum(1) == max(1, min(round(share * across**2), across**2 - 1))).all()
    whole = corners.repeat_interleave(square, 1).repeat_interleave(square, 2)[:, :pixels, :pixels]
    assert torch.equal(whole, hidden[:, 0])


def test_each_square_is_as_likely_and_pictures_differ() -> None:
    hidden = squares_of(8, 2, 0.5, torch.arange(4000), 3)[:, 0, ::2, ::2].flatten(1)
    assert (hidden.float().mean(0) - 0.5).abs().max() < 0.04  # five deviations
    assert hidden.unique(dim=0).shape[0] > 3000
    assert torch.equal(squares_of(8, 2, 0.5, torch.tensor([17]), 3)[0, 0, ::2, ::2].flatten(), hidden[17])


def test_loss_and_gradient_equal_those_of_transformers() -> None:
    """As `ViTForMaskedImageModeling` has it: absolute error over hidden pixels, by their number and the channels."""
    model, arguments, rows = TinyModel(), batch(5), rows_of(torch.arange(5) != 3)
    outputs = outputs_of(model, arguments, rows)
    loss = MaskedImage(square_pixels=PATCH).loss(outputs)
    actual = gradients(loss, model)
    again = outputs_of(model, arguments, rows)
    seed = int(torch.randint(1 << 32, (), generator=again.generator))
    mask = squares_of(SIDE, PATCH, 0.6, torch.arange(5), seed)
    pixels = arguments["pixels"]
    fused = model.fuse(model.encode_image(pixels * ~mask), again.text)
    cut = model.heads["masked_image"](fused.image_BRW).unflatten(-1, (3, PATCH, PATCH))
    across = SIDE // PATCH
    painted = cut.unflatten(1, (across, across)).permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape)
    kept = mask & rows.real_B[:, None, None, None]
    error = torch.nn.functional.l1_loss(pixels, painted, reduction="none")
    expected = (error * kept).sum() / kept.sum() / 3
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients(expected, model).items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


def test_hidden_pixels_do_not_reach_the_model() -> None:
    """Other pixels under the hidden squares change what is asked, not what is painted."""
    seen = []

    class Watching(TinyModel):
        def masked_image_pixels(self, fused: object) -> torch.Tensor:
            painted = super().masked_image_pixels(fused)  # type: ignore[arg-type]
            seen.append(painted)
            return painted

    model, arguments, rows = Watching(), batch(5), rows_of(torch.ones(5, dtype=torch.bool))
    config = MaskedImage(square_pixels=PATCH)
    before = config.loss(outputs_of(model, arguments, rows))
    seed = int(torch.randint(1 << 32, (), generator=torch.Generator().manual_seed(3)))
    hidden = squares_of(SIDE, PATCH, 0.6, torch.arange(5), seed)
    after = config.loss(outputs_of(model, arguments | {"pixels": arguments["pixels"] + 5 * hidden}, rows))
    assert torch.equal(seen[0], seen[1])
    assert after > before + 1
