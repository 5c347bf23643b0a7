"""Pixels to a square view, by one filter for straight and warped views, so that evaluation sees what training saw.

Different filters in training and evaluation shift the distribution: that cost 1–4 points of the quickstart's recall.

Bilinear interpolation reads four pixels of the picture for each pixel of the view. That is right while the view's box
has at most `LEVEL` times its side. In a larger box pixels would be skipped, and a fine checkerboard would show as
moiré, so the kernel is widened. A straight view uses a triangle as wide as the view's pixel each way (antialiased
bilinear, as in Pillow and torchvision). A warped view is read bilinearly from a level: the picture shrunk by such
triangles to `LEVEL` times the side. The variances of these two kernels add up to that of the single one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmflow.imaging.decode import WHITE, Pixels

LEVEL = math.sqrt(2)  # a triangle of half-width w has a variance of w²/6: 1/6 of the level's pixels twice is 2/6
MARGIN = 2  # pixels of a level beyond what a view covers: bilinear interpolation reads one


class Affine(NamedTuple):  # four are made per view: a frozen dataclass takes three times as long
    """What a view shows: at (x, y), from -½ to ½ each way, the box's point (a·x + b·y + c, d·x + e·y + f)."""

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 1.0
    f: float = 0.0

    def of(self, inner: Affine) -> Affine:
        """The map that applies `inner` first, then this one."""
        return Affine(
            self.a * inner.a + self.b * inner.d,
            self.a * inner.b + self.b * inner.e,
            self.a * inner.c + self.b * inner.f + self.c,
            self.d * inner.a + self.e * inner.d,
            self.d * inner.b + self.e * inner.e,
            self.d * inner.c + self.e * inner.f + self.f,
        )


PLAIN = Affine()
MIRRORED = Affine(a=-1.0)
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def resample(pixels: Pixels, side: int, box: Box, warp: Affine = PLAIN) -> Pixels:
    """(side, side, 3): the box of the pixels as the warp shows it; white outside of the picture."""
    if warp in (PLAIN, MIRRORED):
        left, top, right, bottom = box
        antialias = max(right - left, bottom - top) > LEVEL * side
        view = _interpolate(pixels[top:bottom, left:right], side, side, antialias=antialias)
        return view if warp == PLAIN else _mirrored(view)
    return _warped(pixels, side, box, warp)


def _warped(pixels: Pixels, side: int, box: Box, warp: Affine) -> Pixels:
    height, width, _ = pixels.shape
    left, top, right, bottom = box
    # Pixels of the level per pixel of the picture, each way.
    across, down = (min(1.0, LEVEL * side / length) for length in (right - left, bottom - top))
    # The view's point (x, y) is at picture pixel (a·x + b·y + c, d·x + e·y + f).
    on_picture = Affine(right - left, 0, (left + right) / 2, 0, bottom - top, (top + bottom) / 2).of(warp)
    on_level = on_picture
    if min(across, down) < 1:
        reach_x = (abs(on_picture.a) + abs(on_picture.b)) / 2 + MARGIN / across
        reach_y = (abs(on_picture.d) + abs(on_picture.e)) / 2 + MARGIN / down
        first_x, last_x = _within(on_picture.c, reach_x, width)
        first_y, last_y = _within(on_picture.f, reach_y, height)
        part = pixels[first_y:last_y, first_x:last_x]
        width, height = math.ceil((last_x - first_x) * across), math.ceil((last_y - first_y) * down)
        pixels = _interpolate(part, width, height, antialias=True)
        across, down = pixels.shape[1] / (last_x - first_x), pixels.shape[0] / (last_y - first_y)
        on_level = Affine(across, 0, -first_x * across, 0, down, -first_y * down).of(on_picture)
    # Pillow counts the view's pixels: (x, y) = pixel / side - ½
    from_pixel = on_level.of(Affine(1 / side, 0, -0.5, 0, 1 / side, -0.5))
    bilinear = Image.Resampling.BILINEAR
    picture = picture_of(pixels)
    return np.asarray(picture.transform((side, side), Image.Transform.AFFINE, from_pixel, bilinear, fillcolor=WHITE))


def _within(centre: float, reach: float, length: int) -> tuple[int, int]:
    """First and last pixel of a side that a view reaches: at least one, even if it shows nothing of the picture."""
    first = min(max(0, math.floor(centre - reach)), length - 1)
    return first, max(first + 1, min(length, math.ceil(centre + reach)))


def _mirrored(pixels: Pixels) -> Pixels:
    import torch

    # With torch: numpy copies a reversed axis of three-byte pixels byte by byte, which takes 15 times as long.
    return torch.from_numpy(np.require(pixels, requirements=["W"])).flip(1).numpy()


def picture_of(pixels: Pixels) -> Image.Image:
    """Pillow's image of an array. `Image.fromarray` would copy it once more."""
    height, width, _ = pixels.shape
    return Image.frombuffer("RGB", (width, height), np.ascontiguousarray(pixels), "raw", "RGB", 0, 1)


def _interpolate(pixels: Pixels, width: int, height: int, *, antialias: bool) -> Pixels:
    """Bilinear, by torch's vectorised kernel for bytes: several times as fast as Pillow's, equal within one level."""
    import torch
    from torch.nn.functional import interpolate

    if pixels.shape[:2] == (height, width):
        return pixels
    # (1, 3, height, width), with channels last in memory. Pillow's arrays are read-only, which torch warns about.
    planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    resized = interpolate(planes, size=(height, width), mode="bilinear", antialias=antialias)
    return resized.permute(0, 2, 3, 1)[0].numpy()
