"""Stored pictures to what a model sees: the plain centre view for evaluation, random views for training.

A view is a pure function of its generator's seed; the loader seeds it by (seed, epoch, sample), so that any batch can
be rebuilt anywhere. Each view is one affine map of the picture, so that it is resampled once.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from mmflow.loading.config import AugmentConfig

Pixels = NDArray[np.uint8]  # (height, width, 3)

WHITE = (255, 255, 255)
# Inputs of about zero mean and unit size; CLIP's own constants would claim the statistics of photographs.
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)


def decode(body: bytes, extension: str, least_side: int) -> Pixels:
    """RGB pixels of a stored picture, both sides at least `least_side` where the picture has as many.

    A JPEG is shrunk while it is decoded, in the frequency domain: a quarter of the pixels at a quarter of the time.
    """
    if extension in ("jpg", "jpeg"):
        pixels: Pixels = simplejpeg.decode_jpeg(body, min_height=least_side, min_width=least_side)
        return pixels
    with Image.open(io.BytesIO(body)) as picture:
        return np.asarray(picture.convert("RGB"))


def centre_view(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square as (side, side, 3), resampled just as a random view is.

    Another filter here than in training is a shift of distribution: it cost 1–4 points of recall on the quickstart.
    """
    return _affine_view(pixels, side, scale=1.0, squeeze=1.0, angle=0.0, right=0.0, down=0.0)


def random_view(pixels: Pixels, side: int, augment: AugmentConfig, random: np.random.Generator) -> Pixels:
    """A random view of the centred square, (side, side, 3): zoom, aspect, shift, turn, mirror, brightness, contrast.

    The same numbers are drawn whatever is switched off, so that switching one thing on leaves the others as they were.
    """
    zoom, aspect, right, down, turn = random.uniform(-1, 1, size=5)
    mirror = random.random() < augment.flip
    brightness, contrast = random.uniform(-1, 1, size=2)
    view = _affine_view(
        pixels,
        side,
        scale=augment.max_zoom**zoom,
        squeeze=augment.max_aspect**aspect * (-1 if mirror else 1),
        angle=math.radians(turn * augment.max_rotation_degrees),
        right=right * augment.max_shift,
        down=down * augment.max_shift,
    )
    if augment.brightness or augment.contrast:
        view = _recolour(view, 1 + brightness * augment.brightness, 1 + contrast * augment.contrast)
    return view


def _affine_view(
    pixels: Pixels, side: int, *, scale: float, squeeze: float, angle: float, right: float, down: float
) -> Pixels:
    """The centred square zoomed, squeezed (negative mirrors), turned, and moved by shares of its edge."""
    height, width, _ = pixels.shape
    # Shares the array's memory; `fromarray` would copy it twice.
    picture: Image.Image = Image.frombuffer("RGB", (width, height), np.ascontiguousarray(pixels), "raw", "RGB", 0, 1)
    edge = min(picture.size)
    if edge >= 2 * side:  # an affine map reads four pixels of the source: shrink first, or thin lines vanish
        picture = picture.reduce(edge // side)
        edge = min(picture.size)
    step = edge / side * scale
    a, b = math.cos(angle) * step * squeeze, -math.sin(angle) * step
    d, e = math.sin(angle) * step * squeeze, math.cos(angle) * step
    centre_x = picture.width / 2 + right * edge
    centre_y = picture.height / 2 + down * edge
    # output (x, y) reads the source at (a·x + b·y + c, d·x + e·y + f)
    half = side / 2
    affine = (a, b, centre_x - (a + b) * half, d, e, centre_y - (d + e) * half)
    bilinear = Image.Resampling.BILINEAR
    return np.asarray(picture.transform((side, side), Image.Transform.AFFINE, affine, bilinear, fillcolor=WHITE))


def _recolour(pixels: Pixels, brightness: float, contrast: float) -> Pixels:
    # One table of 256 levels does both: contrast about mid grey, then brightness.
    levels = ((np.arange(256, dtype=np.float32) - 127.5) * contrast + 127.5) * brightness
    return np.take(np.minimum(np.maximum(levels, 0), 255).astype(np.uint8), pixels)


def drop_tokens(tokens: Sequence[int], share: float, random: np.random.Generator) -> list[int]:
    """The tokens less a random share, the first and last always kept; all of them where nothing would be left."""
    kept = [token for token, keep in zip(tokens[1:-1], random.random(len(tokens) - 2) >= share, strict=True) if keep]
    return [tokens[0], *kept, tokens[-1]] if kept else list(tokens)
