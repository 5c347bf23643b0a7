"""Pictures that tests of decoding and of views are made of."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mmflow.imaging.decode import Pixels


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Red grows to the right, green downwards."""
    red = np.broadcast_to(np.linspace(40, 200, width)[None, :], (height, width))
    green = np.broadcast_to(np.linspace(40, 200, height)[:, None], (height, width))
    return np.stack([red, green, np.full((height, width), 90.0)], axis=-1).astype(np.uint8)


def checkerboard(height: int, width: int, cell: int = 1) -> Pixels:
    """Black and white squares of so many pixels."""
    rows, columns = np.indices((height, width)) // cell
    return np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def encoded(pixels: Pixels, format: str, **options: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format, **{"quality": 95, **options})
    return target.getvalue()
