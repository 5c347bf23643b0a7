"""RandAugment: a few operations at random, all of one strength (Cubuk et al., 1909.13719).

Ranges are those of the paper's code and of torchvision's. Two things are ours: operations that move pixels are folded
into the view's one affine map, so that a view is resampled once; and those that change values come after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mmflow.imaging.decode import Pixels
from mmflow.imaging.resample import PLAIN, Affine, picture_of
from mmflow.loading.config import PoliciesConfig

MOST = 8  # operations a view: `PoliciesConfig.count`
SHEAR = 0.3
TRANSLATION = 150 / 331  # of the view's side
ROTATION = math.radians(30)
FACTOR = 0.9  # most that brightness, contrast, colour and sharpness differ from 1
LOST_BITS = 4


class Chosen(NamedTuple):
    """An operation and how much of its range it is given: from -1 to 1."""

    operation: str
    amount: float


def _rotation(amount: float) -> Affine:
    cosine, sine = math.cos(amount * ROTATION), math.sin(amount * ROTATION)
    return Affine(cosine, -sine, 0.0, sine, cosine, 0.0)


WARPS: dict[str, Callable[[float], Affine]] = {
    "shear_x": lambda amount: Affine(b=amount * SHEAR),
    "shear_y": lambda amount: Affine(d=amount * SHEAR),
    "translate_x": lambda amount: Affine(c=amount * TRANSLATION),
    "translate_y": lambda amount: Affine(f=amount * TRANSLATION),
    "rotate": _rotation,
}
PAINTS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": lambda image, amount: ImageEnhance.Brightness(image).enhance(1 + amount * FACTOR),
    "contrast": lambda image, amount: ImageEnhance.Contrast(image).enhance(1 + amount * FACTOR),
    "colour": lambda image, amount: ImageEnhance.Color(image).enhance(1 + amount * FACTOR),
    "sharpness": lambda image, amount: ImageEnhance.Sharpness(image).enhance(1 + amount * FACTOR),
    "posterise": lambda image, amount: ImageOps.posterize(image, 8 - round(abs(amount) * LOST_BITS)),
    "solarise": lambda image, amount: ImageOps.solarize(image, round(255 * (1 - abs(amount)))),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalise": lambda image, _: ImageOps.equalize(image),
}


def choose(policies: PoliciesConfig, draws: Sequence[float]) -> tuple[Chosen, ...]:
    """Operations by two draws each, in [0, 1): which, and which way."""
    count = len(policies.operations)
    return tuple(
        Chosen(policies.operations[int(which * count)], policies.strength if way < 0.5 else -policies.strength)
        for which, way in zip(draws[: 2 * policies.count : 2], draws[1 : 2 * policies.count : 2], strict=True)
    )


def warp_of(chosen: Iterable[Chosen]) -> Affine:
    """Those that move pixels, one after another, as one map."""
    warp = PLAIN
    for operation, amount in chosen:
        if operation in WARPS:
            warp = warp.of(WARPS[operation](amount))
    return warp


def paint(pixels: Pixels, chosen: Iterable[Chosen]) -> Pixels:
    """Those that change values, one after another, on a view (side, side, 3) uint8."""
    paints = [(PAINTS[operation], amount) for operation, amount in chosen if operation in PAINTS]
    if not paints:
        return pixels
    image = picture_of(pixels)
    for operation, amount in paints:
        image = operation(image, amount)
    return np.asarray(image)
