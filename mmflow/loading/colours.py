"""Colour jitter: one table of levels for brightness and contrast alone, one matrix once saturation or hue is in it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmflow.imaging.decode import Pixels

GREY = 127.5  # what contrast turns about
LUMA = np.array([0.213, 0.715, 0.072])  # of red, green and blue, as W3C's filters have them
# Hue as a turn of the two colour differences about the grey axis: cosine's and sine's part, from the same standard.
COSINE = np.eye(3) - LUMA
SINE = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])


class Recolour(NamedTuple):
    """What is done to a view's colours, all at once and clipped once."""

    brightness: float = 1.0  # factor
    contrast: float = 1.0  # factor of the distance from mid grey
    saturation: float = 1.0  # factor of the distance from the pixel's own grey
    hue: float = 0.0  # turns of the colour circle


AS_IT_IS = Recolour()


def recolour(pixels: Pixels, change: Recolour) -> Pixels:
    """The recoloured view, (height, width, 3) uint8.

    Saturation and hue are linear and keep the luma (W3C Filter Effects, feColorMatrix `saturate` and `hueRotate`), then
    contrast about mid grey, then brightness.
    """
    if change == AS_IT_IS:
        return pixels
    gain = change.brightness * change.contrast
    shift = GREY * (1 - change.contrast) * change.brightness
    if change.saturation == 1 and change.hue == 0:
        levels = np.arange(256, dtype=np.float32) * np.float32(gain) + np.float32(shift)
        return np.take(np.minimum(np.maximum(levels, 0), 255).astype(np.uint8), pixels)
    # (height · width, 3) × (3, 3); Pillow's own conversion by a matrix takes four times as long
    matrix = (gain * _colour_matrix(change.saturation, change.hue)).astype(np.float32)
    values: NDArray[np.float32] = pixels.reshape(-1, 3).astype(np.float32) @ matrix.T
    values += np.float32(shift)
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8).reshape(pixels.shape)


def _colour_matrix(saturation: float, hue: float) -> NDArray[np.float64]:
    grey = np.broadcast_to(LUMA, (3, 3))
    turned = grey + math.cos(2 * math.pi * hue) * COSINE + math.sin(2 * math.pi * hue) * SINE
    saturated: NDArray[np.float64] = (saturation * np.eye(3) + (1 - saturation) * grey) @ turned
    return saturated
