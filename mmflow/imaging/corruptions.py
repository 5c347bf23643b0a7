"""Named corruptions of a view, to measure what a model still recognises (after ImageNet-C, arXiv 1903.12261).

They change the view that the model sees, as in the paper, and not the stored picture before it is shrunk. Shrinking
1,600 pixels to 32 averages noise away and leaves nothing of JPEG's blocks, so a severity would be strong for small
pictures and nothing for large ones. On the view it is the same for every row. The price is that a crop is enlarged from
the view's pixels, so it is softer than a crop of the stored picture.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from mmflow.core.randomness import generator_of
from mmflow.imaging.decode import Pixels
from mmflow.imaging.resample import picture_of, resample

Corruption = Literal["jpeg", "blur", "noise", "crop", "grey"]
Severity = Literal[1, 2, 3, 4, 5]

# The authors' severities 1 to 5 for views of 32 (CIFAR-10-C), 64 (Tiny ImageNet-C) and 224 pixels (ImageNet-C). What
# is mild at 224 pixels hides everything at 32.
SIDES = (32, 64, 224)
JPEG_QUALITY = np.array([[80, 65, 58, 50, 40], [65, 58, 50, 40, 25], [25, 18, 15, 10, 7]])
BLUR_PIXELS = np.array([[0.4, 0.6, 0.7, 0.8, 1.0], [0.5, 0.75, 1.0, 1.25, 1.5], [1, 2, 3, 4, 6]])  # `gaussian_blur`
NOISE = np.array([[0.04, 0.06, 0.08, 0.09, 0.1], [0.04, 0.08, 0.12, 0.15, 0.18], [0.08, 0.12, 0.18, 0.26, 0.38]])
BLUR = BLUR_PIXELS / np.array(SIDES)[:, None]  # as a share of the side, so that views above 224 pixels blur as much

# ImageNet-C has neither of these.
CROPPED_SIDE = (0.9, 0.8, 0.7, 0.6, 0.5)  # share of the side that is left: of the area, from 81% to a quarter
LOST_COLOUR = (0.2, 0.4, 0.6, 0.8, 1.0)

MID_GREY = 128


def corrupt(pixels: Pixels, name: Corruption, severity: Severity, key: str) -> Pixels:
    """The corrupted view, (side, side, 3) uint8 as `pixels`; the same for the same arguments, on every machine.

    The draws depend on the name and the sample's key alone: a higher severity is more of the same noise, or a smaller
    part of the same place.
    """
    return CORRUPTIONS[name](pixels, severity, generator_of(f"{name} {key}"))


def blank(pixels: Pixels) -> Pixels:
    """A mid-grey view of the same shape, in place of a picture that is missing."""
    return np.full_like(pixels, MID_GREY)


def _jpeg(pixels: Pixels, severity: Severity, random: np.random.Generator) -> Pixels:
    body = io.BytesIO()
    picture_of(pixels).save(body, "JPEG", quality=round(_strength(JPEG_QUALITY, pixels, severity)))
    return np.asarray(Image.open(body))


def _blur(pixels: Pixels, severity: Severity, random: np.random.Generator) -> Pixels:
    deviation = _strength(BLUR, pixels, severity) * len(pixels)
    return np.asarray(picture_of(pixels).filter(ImageFilter.GaussianBlur(deviation)))


def _noise(pixels: Pixels, severity: Severity, random: np.random.Generator) -> Pixels:
    noise = random.standard_normal(pixels.shape, dtype=np.float32)
    noise *= np.float32(255 * _strength(NOISE, pixels, severity))
    noise += pixels
    return np.clip(np.rint(noise), 0, 255).astype(np.uint8)


def _crop(pixels: Pixels, severity: Severity, random: np.random.Generator) -> Pixels:
    side = len(pixels)
    edge = max(1, round(CROPPED_SIDE[severity - 1] * side))
    left, top = (int(draw * (side - edge + 1)) for draw in random.random(2))
    return resample(pixels, side, (left, top, left + edge, top + edge))


def _grey(pixels: Pixels, severity: Severity, random: np.random.Generator) -> Pixels:
    return np.asarray(ImageEnhance.Color(picture_of(pixels)).enhance(1 - LOST_COLOUR[severity - 1]))


def _strength(table: NDArray[np.floating] | NDArray[np.integer], pixels: Pixels, severity: Severity) -> float:
    """The published strength at the view's side; between two published sides by the logarithm of the side."""
    return float(np.interp(math.log(len(pixels)), np.log(SIDES), table[:, severity - 1]))


CORRUPTIONS: dict[Corruption, Callable[[Pixels, Severity, np.random.Generator], Pixels]] = {
    "jpeg": _jpeg,
    "blur": _blur,
    "noise": _noise,
    "crop": _crop,
    "grey": _grey,
}
