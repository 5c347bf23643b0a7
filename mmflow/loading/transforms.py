"""Stored pictures to what a model sees: the plain centre view for evaluation, random views for training.

A view is a pure function of (seed, view, key), whatever batch, rank or worker asks for it. So any batch can be rebuilt
anywhere, and a teacher's cached outputs fit the student's views. The geometry of a view is one affine map, so the
picture is resampled once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from mmflow.core.randomness import generator_of
from mmflow.imaging.decode import Pixels, open_picture, read_pixels
from mmflow.imaging.resample import PLAIN, Affine, Box, picture_of, resample
from mmflow.loading.config import AugmentConfig, CropConfig, PoliciesConfig

CROP_ATTEMPTS = 10  # as in Inception's and torchvision's crop: a shape that does not fit is drawn again
SINGLE_DRAWS = 12
MAX_OPERATIONS = 8  # per view: the bound of `PoliciesConfig.count`
OPERATION_DRAWS = SINGLE_DRAWS + 2 * CROP_ATTEMPTS  # where the draws of the operations begin
DRAWS = OPERATION_DRAWS + 2 * MAX_OPERATIONS

Subject = Literal["picture", "frames", "text", "window", "dropout"]
Part = tuple[float, float, float, float]  # left, top, width, height of a part, as shares of the picture's


def generator(seed: int, view: int, key: str, subject: Subject = "picture") -> np.random.Generator:
    """The random numbers of one view of a sample. `view` is the epoch, or the number of a stored augmentation.

    Each subject has its own stream, so a setting of the text does not change the pictures.
    """
    return generator_of(f"{seed} {view} {subject} {key}")


def choose_frames(total: int, count: int, random: np.random.Generator | None = None) -> list[int]:
    """`count` ascending frames of a clip of `total`, one from each of as many equal spans (TSN, 1608.00859).

    With `random`, any frame of a span (training), else its middle (evaluation). A clip with fewer frames gives all of
    them, and the batch masks the rest. Always draws `count` numbers.
    """
    draws = np.full(count, 0.5) if random is None else random.random(count)
    kept = min(total, count)
    bounds = [number * total // kept for number in range(kept + 1)]
    return [start + int(draw * (end - start)) for start, end, draw in zip(bounds, bounds[1:], draws, strict=False)]


# --- colour jitter ----------------------------------------------------------------------------------------------------

GREY = 127.5  # the centre of contrast
LUMA = np.array([0.213, 0.715, 0.072])  # of red, green and blue, as in W3C's filters
# A turn of the hue as a rotation of the two colour differences about the grey axis, from the same standard.
COSINE = np.eye(3) - LUMA
SINE = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])


class Recolour(NamedTuple):
    """Changes of a view's colours, applied together and clipped once."""

    brightness: float = 1.0  # factor
    contrast: float = 1.0  # factor of the distance from mid grey
    saturation: float = 1.0  # factor of the distance from the pixel's own grey
    hue: float = 0.0  # turns of the colour circle


AS_IT_IS = Recolour()


def recolour(pixels: Pixels, change: Recolour) -> Pixels:
    """The recoloured view, (height, width, 3) uint8.

    Saturation and hue come first; they are linear and keep the luma (W3C Filter Effects, feColorMatrix `saturate` and
    `hueRotate`). Then contrast about mid grey, then brightness.
    """
    if change == AS_IT_IS:
        return pixels
    gain = change.brightness * change.contrast
    shift = GREY * (1 - change.contrast) * change.brightness
    if change.saturation == 1 and change.hue == 0:
        levels = np.arange(256, dtype=np.float32) * np.float32(gain) + np.float32(shift)
        return np.take(np.minimum(np.maximum(levels, 0), 255).astype(np.uint8), pixels)
    angle = 2 * math.pi * change.hue
    grey = np.broadcast_to(LUMA, (3, 3))
    turned = grey + math.cos(angle) * COSINE + math.sin(angle) * SINE
    saturated = (change.saturation * np.eye(3) + (1 - change.saturation) * grey) @ turned
    # (height · width, 3) × (3, 3). Pillow's own conversion by a matrix takes four times as long.
    matrix = (gain * saturated).astype(np.float32)
    values: NDArray[np.float32] = pixels.reshape(-1, 3).astype(np.float32) @ matrix.T
    values += np.float32(shift)
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8).reshape(pixels.shape)


# --- RandAugment ------------------------------------------------------------------------------------------------------

# A few random operations of the same strength (Cubuk et al., 1909.13719). Ranges are those of the paper's code and of
# torchvision's. Unlike there, operations that move pixels are folded into the view's affine map, and those that change
# values come after it.
SHEAR = 0.3
TRANSLATION = 150 / 331  # of the view's side
ROTATION = math.radians(30)
FACTOR = 0.9  # largest change of brightness, contrast, colour and sharpness from 1
LOST_BITS = 4


class Chosen(NamedTuple):
    """An operation and the share of its range, from -1 to 1."""

    operation: str
    amount: float


def rotation(angle: float, scale: float = 1.0, squeeze: float = 1.0, x: float = 0.0, y: float = 0.0) -> Affine:
    """A rotation in radians with a scale, a factor of the width, and a shift."""
    cosine, sine = math.cos(angle) * scale, math.sin(angle) * scale
    return Affine(cosine * squeeze, -sine, x, sine * squeeze, cosine, y)


WARPS: dict[str, Callable[[float], Affine]] = {
    "shear_x": lambda amount: Affine(b=amount * SHEAR),
    "shear_y": lambda amount: Affine(d=amount * SHEAR),
    "translate_x": lambda amount: Affine(c=amount * TRANSLATION),
    "translate_y": lambda amount: Affine(f=amount * TRANSLATION),
    "rotate": lambda amount: rotation(amount * ROTATION),
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
    """Operations from two draws each, in [0, 1): which operation, and which way."""
    count = len(policies.operations)
    return tuple(
        Chosen(policies.operations[int(which * count)], policies.strength if way < 0.5 else -policies.strength)
        for which, way in zip(draws[: 2 * policies.count : 2], draws[1 : 2 * policies.count : 2], strict=True)
    )


def warp_of(operations: Iterable[Chosen]) -> Affine:
    """The operations that move pixels, one after another, as one map."""
    warp = PLAIN
    for operation, amount in operations:
        if operation in WARPS:
            warp = warp.of(WARPS[operation](amount))
    return warp


def paint(pixels: Pixels, operations: Iterable[Chosen]) -> Pixels:
    """A view (side, side, 3) uint8 after the operations that change values, one after another."""
    paints = [(PAINTS[operation], amount) for operation, amount in operations if operation in PAINTS]
    if not paints:
        return pixels
    image = picture_of(pixels)
    for change, amount in paints:
        image = change(image, amount)
    return np.asarray(image)


# --- views ------------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """One view of a picture as numbers; the frames of a clip share it."""

    part: Part
    warp: Affine = PLAIN
    colours: Recolour = AS_IT_IS
    operations: tuple[Chosen, ...] = ()


def random_views(
    bodies: Sequence[bytes], extension: str, side: int, augment: AugmentConfig, random: np.random.Generator
) -> list[Pixels]:
    """The same random view of each frame of a clip, (side, side, 3) uint8. Raises CorruptArtifactError."""
    draws = random.random(DRAWS).tolist()
    views = []
    for body in bodies:
        picture = open_picture(body, extension)
        view = draw_view(picture.width, picture.height, augment, draws)
        # A crop is decoded at the scale that it needs. Without one, the shorter side of the picture decides.
        share = view.part[2:] if augment.crop is not None else (1.0, 1.0)
        views.append(show(read_pixels(picture, side, share), side, view))
    return views


def centre_view(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square as (side, side, 3), through the same filter as every random view."""
    height, width, _ = pixels.shape
    return show(pixels, side, View(centre(width, height)))


def draw_view(width: int, height: int, augment: AugmentConfig, draws: Sequence[float]) -> View:
    """The view of a picture of that size, from `DRAWS` numbers in [0, 1).

    Each setting has its own numbers, whatever is switched off, so switching one on leaves the others as they were.
    """
    zoom, aspect, right, down, turn, *colours, flip, crop_x, crop_y = draws[:SINGLE_DRAWS]
    part = centre(width, height)
    if augment.crop is not None:
        part = draw_crop(width, height, augment.crop, draws[SINGLE_DRAWS:OPERATION_DRAWS], crop_x, crop_y)
    scale = augment.max_zoom ** _either_way(zoom)
    squeeze = augment.max_aspect ** _either_way(aspect) * (-1 if flip < augment.flip else 1)
    angle = math.radians(_either_way(turn) * augment.max_rotation_degrees)
    shift_x, shift_y = _either_way(right) * augment.max_shift, _either_way(down) * augment.max_shift
    warp = rotation(angle, scale, squeeze, shift_x, shift_y)
    operations = () if augment.policies is None else choose(augment.policies, draws[OPERATION_DRAWS:])
    brightness, contrast, saturation, hue = map(_either_way, colours)
    return View(
        part=part,
        warp=warp.of(warp_of(operations)) if operations else warp,
        colours=Recolour(
            1 + brightness * augment.brightness,
            1 + contrast * augment.contrast,
            1 + saturation * augment.saturation,
            hue * augment.hue,
        ),
        operations=operations,
    )


def show(pixels: Pixels, side: int, view: View) -> Pixels:
    """The view of decoded pixels, (side, side, 3) uint8."""
    height, width, _ = pixels.shape
    resampled = resample(pixels, side, _box(view.part, width, height), view.warp)
    return paint(recolour(resampled, view.colours), view.operations)


def centre(width: int, height: int) -> Part:
    """The largest centred square."""
    edge = min(width, height)
    return (width - edge) / 2 / width, (height - edge) / 2 / height, edge / width, edge / height


def draw_crop(width: int, height: int, crop: CropConfig, shapes: Sequence[float], x: float, y: float) -> Part:
    """A part of random area and aspect at a random place: the first shape that fits, of two draws each.

    If none fits, the centre with the nearest aspect that is allowed.
    """
    (least_area, most_area), (least_aspect, most_aspect) = crop.area, crop.aspect
    for area, aspect in zip(shapes[::2], shapes[1::2], strict=True):
        width_over_height = least_aspect * (most_aspect / least_aspect) ** aspect
        pixels = (least_area + area * (most_area - least_area)) * width * height
        share_x, share_y = math.sqrt(pixels * width_over_height) / width, math.sqrt(pixels / width_over_height) / height
        if share_x <= 1 and share_y <= 1:
            return x * (1 - share_x), y * (1 - share_y), share_x, share_y
    aspect = min(max(width / height, least_aspect), most_aspect)
    share_x, share_y = min(1.0, aspect * height / width), min(1.0, width / aspect / height)
    return (1 - share_x) / 2, (1 - share_y) / 2, share_x, share_y


def _either_way(draw: float) -> float:
    """A draw in [0, 1) as a number from -1 to 1."""
    return 2 * draw - 1


def _box(part: Part, width: int, height: int) -> Box:
    """The part in whole pixels, at least one each way. A square part of square pixels stays square."""
    left, top, share_x, share_y = part
    box_width, box_height = max(1, round(share_x * width)), max(1, round(share_y * height))
    first_x = min(round(left * width), width - box_width)
    first_y = min(round(top * height), height - box_height)
    return first_x, first_y, first_x + box_width, first_y + box_height
