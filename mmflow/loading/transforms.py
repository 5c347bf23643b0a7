"""Stored pictures to what a model sees: the plain centre view for evaluation, random views for training.

A view is a pure function of (seed, view, key), whatever batch, rank or worker asks for it: any batch can be rebuilt
anywhere, and a teacher's cached output replayed. Its geometry is one affine map of the picture, resampled once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from mmflow.imaging.decode import Pixels, open_picture, read_pixels
from mmflow.imaging.resample import PLAIN, Affine, Box, resample
from mmflow.loading.colours import AS_IT_IS, Recolour, recolour
from mmflow.loading.config import AugmentConfig, CropConfig
from mmflow.loading.policies import MOST, Chosen, choose, paint, warp_of

CROP_ATTEMPTS = 10  # as in Inception's and torchvision's crop: a shape that does not fit is drawn anew
SINGLE_DRAWS = 12
OPERATION_DRAWS = SINGLE_DRAWS + 2 * CROP_ATTEMPTS  # where those of the policies begin
DRAWS = OPERATION_DRAWS + 2 * MOST

Subject = Literal["picture", "frames", "text", "window", "dropout"]
Part = tuple[float, float, float, float]  # left, top, width, height of a part, as shares of the picture's


def generator(seed: int, view: int, key: str, subject: Subject = "picture") -> np.random.Generator:
    """The random numbers of one view of a sample. `view` is the epoch, or the number of a stored augmentation.

    Each subject has a stream of its own, so that what is switched on for the text leaves the pictures as they were.
    """
    digest = xxhash.xxh3_128_intdigest(f"{seed} {view} {subject} {key}".encode())
    return np.random.Generator(np.random.Philox(key=digest))


class View(NamedTuple):
    """One view of a picture as numbers; the frames of a clip share it."""

    part: Part
    warp: Affine = PLAIN
    colours: Recolour = AS_IT_IS
    operations: tuple[Chosen, ...] = ()


def random_view(body: bytes, extension: str, side: int, augment: AugmentConfig, random: np.random.Generator) -> Pixels:
    """A random view of a stored picture, (side, side, 3) uint8. Raises CorruptArtifactError for what is no picture."""
    return random_views([body], extension, side, augment, random)[0]


def random_views(
    bodies: Sequence[bytes], extension: str, side: int, augment: AugmentConfig, random: np.random.Generator
) -> list[Pixels]:
    """The frames of a clip, each as the same random view, (side, side, 3) uint8. Raises CorruptArtifactError."""
    draws = random.random(DRAWS).tolist()
    views = []
    for body in bodies:
        picture = open_picture(body, extension)
        view = draw_view(picture.width, picture.height, augment, draws)
        # A crop is decoded at the scale that it needs; the part of a centred square counts by its shorter side.
        share = view.part[2:] if augment.crop is not None else (1.0, 1.0)
        views.append(show(read_pixels(picture, side, share), side, view))
    return views


def centre_view(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square as (side, side, 3), through the same filter as every random view."""
    height, width, _ = pixels.shape
    return show(pixels, side, View(centre(width, height)))


def draw_view(width: int, height: int, augment: AugmentConfig, draws: Sequence[float]) -> View:
    """The view of a picture of that size by `DRAWS` numbers in [0, 1).

    Every number has its place, whatever is switched off, so that switching one thing on leaves the others as they were.
    """
    zoom, aspect, right, down, turn, brightness, contrast, saturation, hue, flip, crop_x, crop_y = draws[:SINGLE_DRAWS]
    part = centre(width, height)
    if augment.crop is not None:
        part = draw_crop(width, height, augment.crop, draws[SINGLE_DRAWS:OPERATION_DRAWS], crop_x, crop_y)
    scale = augment.max_zoom ** _either_way(zoom)
    squeeze = augment.max_aspect ** _either_way(aspect) * (-1 if flip < augment.flip else 1)
    angle = math.radians(_either_way(turn) * augment.max_rotation_degrees)
    cosine, sine = math.cos(angle) * scale, math.sin(angle) * scale
    shift_x, shift_y = _either_way(right) * augment.max_shift, _either_way(down) * augment.max_shift
    warp = Affine(cosine * squeeze, -sine, shift_x, sine * squeeze, cosine, shift_y)
    chosen = () if augment.policies is None else choose(augment.policies, draws[OPERATION_DRAWS:])
    return View(
        part=part,
        warp=warp.of(warp_of(chosen)) if chosen else warp,
        colours=Recolour(
            1 + _either_way(brightness) * augment.brightness,
            1 + _either_way(contrast) * augment.contrast,
            1 + _either_way(saturation) * augment.saturation,
            _either_way(hue) * augment.hue,
        ),
        operations=chosen,
    )


def show(pixels: Pixels, side: int, view: View) -> Pixels:
    """The view of decoded pixels, (side, side, 3) uint8."""
    height, width, _ = pixels.shape
    return paint(
        recolour(resample(pixels, side, _box(view.part, width, height), view.warp), view.colours), view.operations
    )


def centre(width: int, height: int) -> Part:
    """The largest centred square."""
    edge = min(width, height)
    return (width - edge) / 2 / width, (height - edge) / 2 / height, edge / width, edge / height


def draw_crop(width: int, height: int, crop: CropConfig, shapes: Sequence[float], x: float, y: float) -> Part:
    """A part of random area and aspect at a random place: the first of the shapes that fits, two draws each.

    Where none does, the centre cut to the nearest aspect that is allowed.
    """
    (least_area, most_area), (least_aspect, most_aspect) = crop.area, crop.aspect
    for area, aspect in zip(shapes[::2], shapes[1::2], strict=True):
        across_down = least_aspect * (most_aspect / least_aspect) ** aspect
        pixels = (least_area + area * (most_area - least_area)) * width * height
        share_x, share_y = math.sqrt(pixels * across_down) / width, math.sqrt(pixels / across_down) / height
        if share_x <= 1 and share_y <= 1:
            return x * (1 - share_x), y * (1 - share_y), share_x, share_y
    aspect = min(max(width / height, least_aspect), most_aspect)
    share_x, share_y = min(1.0, aspect * height / width), min(1.0, width / aspect / height)
    return (1 - share_x) / 2, (1 - share_y) / 2, share_x, share_y


def _either_way(draw: float) -> float:
    """From -1 to 1, by a draw in [0, 1)."""
    return 2 * draw - 1


def _box(part: Part, width: int, height: int) -> Box:
    """Whole pixels, at least one each way; a square part of a square of pixels stays square."""
    left, top, share_x, share_y = part
    across, down = max(1, round(share_x * width)), max(1, round(share_y * height))
    first_x = min(round(left * width), width - across)
    first_y = min(round(top * height), height - down)
    return first_x, first_y, first_x + across, first_y + down
