"""Stored pictures to what a model sees: the plain centre view for evaluation, random views for training.

A view is a pure function of (seed, view, key), whatever batch, rank or worker asks for it: any batch can be rebuilt
anywhere, and a teacher's cached output replayed. Its geometry is one affine map of the picture, resampled once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from mmflow.imaging.colour import Pixels
from mmflow.imaging.decode import open_picture, read_pixels
from mmflow.imaging.resample import PLAIN, Affine, Box, picture_of, resample
from mmflow.loading.config import AugmentConfig, CropConfig, PoliciesConfig


def choose_frames(total: int, count: int, random: np.random.Generator | None = None) -> list[int]:
    """`count` ascending numbers below `total`, one of each of as many equal spans; all where the clip has no more.

    Where `random` is given, any of its span (training); else the middle (evaluation). A clip that has fewer frames than
    `count` gives fewer numbers: the batch masks the rest. Always draws `count` numbers.
    """
    draws = np.full(count, 0.5) if random is None else random.random(count)
    kept = min(total, count)
    bounds = [number * total // kept for number in range(kept + 1)]
    return [start + int(draw * (end - start)) for start, end, draw in zip(bounds, bounds[1:], draws, strict=False)]


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
