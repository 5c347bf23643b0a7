"""Stored pictures to RGB pixels: a JPEG at the scale that its view needs, which is most of what a loader can save."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mmflow.core.errors import CorruptArtifactError
from mmflow.imaging.colour import flatten, solid
from mmflow.imaging.header import TURNS

Pixels = NDArray[np.uint8]  # (height, width, 3)

WHITE = (255, 255, 255)
EXIF = b"Exif\0\0"
EXIF_WITHIN = 4096  # bytes from the start of a file; a camera writes it first
# Seven eighths take 8 to 20% longer than the whole (96 to 1500 pixels a side, measured): that scale is passed over.
LEAST_FACTOR = 1.3


class Picture(NamedTuple):
    """A stored picture whose header is read; width and height are those of the upright picture, in pixels."""

    body: bytes
    extension: str
    width: int
    height: int
    orientation: int  # EXIF, 1 to 8: what is still to be done about it
    image: Image.Image | None  # opened by Pillow, not a pixel decoded; None: a plain JPEG


def open_picture(body: bytes, extension: str) -> Picture:
    """The picture's header, no pixel decoded. Raises CorruptArtifactError where there is none."""
    image, orientation = None, 1
    if extension in ("jpg", "jpeg"):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(body)
        except ValueError:  # not to the letter, as with stray bytes after a marker: Pillow is more patient
            colours = "unknown"
        plain = colours in ("YCbCr", "Gray", "RGB")  # CMYK is Pillow's
        if plain and body.find(EXIF, 0, EXIF_WITHIN) < 0:
            return Picture(body, extension, width, height, orientation, None)
    else:
        plain = False
    try:
        image = Image.open(io.BytesIO(body))
        if image.format in ("JPEG", "MPO", "WEBP"):  # of a PNG Pillow would decode the pixels in search of it
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # Pillow's parsers raise whatever they trip over: struct.error, KeyError, SyntaxError …
        raise _damaged(body, extension, error) from error
    orientation = orientation if orientation in TURNS else 1
    width, height = image.size[::-1] if TURNS[orientation][0] % 2 else image.size
    return Picture(body, extension, width, height, orientation, None if plain else image)


def read_pixels(picture: Picture, least_side: int, share: tuple[float, float] = (1.0, 1.0)) -> Pixels:
    """The upright picture, (height, width, 3) uint8, transparent parts white; a JPEG shrunk while it is decoded.

    The part of the picture that is `share` of its width and of its height keeps at least `least_side` pixels each way
    where it has as many. libjpeg scales by eighths in the frequency domain (an inverse transform of fewer coefficients
    of each block), so that the scale is never below what is asked and rarely far above: a quarter of the pixels comes
    at a third of the time, and what is too fine for it is cut off, not folded back. Raises CorruptArtifactError.
    """
    turns, mirror = TURNS[picture.orientation]
    least_width, least_height = math.ceil(least_side / share[0]), math.ceil(least_side / share[1])
    if turns % 2:
        least_width, least_height = least_height, least_width
    try:
        if picture.image is None:
            pixels: Pixels = _decode_jpeg(picture.body, least_width, least_height)
        else:
            picture.image.load()
            pixels = flatten(solid(picture.image, WHITE), WHITE)
    except Exception as error:
        raise _damaged(picture.body, picture.extension, error) from error
    if turns:
        pixels = np.rot90(pixels, turns)
    return pixels[:, ::-1] if mirror else pixels


def decode(body: bytes, extension: str, least_side: int) -> Pixels:
    """The upright picture, both sides at least `least_side` where it has as many. Raises CorruptArtifactError."""
    return read_pixels(open_picture(body, extension), least_side)


def _decode_jpeg(body: bytes, least_width: int, least_height: int) -> Pixels:
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            body, min_height=least_height, min_width=least_width, min_factor=LEAST_FACTOR
        )
    except ValueError:  # as in `open_picture`; a file cut short is damaged for Pillow too
        with Image.open(io.BytesIO(body)) as image:
            return np.asarray(image.convert("RGB"))
    return pixels


def _damaged(body: bytes, extension: str, error: Exception) -> CorruptArtifactError:
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return CorruptArtifactError(
        f"a .{extension} of {len(body)} bytes cannot be decoded ({what}); set loader.on_corrupt: skip to go on without"
    )
