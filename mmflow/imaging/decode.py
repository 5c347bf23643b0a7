"""Bytes to RGB pixels: stored pictures for training, and source images of any format, still or animated.

JPEG goes through simplejpeg, which shrinks while it decodes (1600×1200 → 256 px: 156 images/s a core; Pillow in full:
26). Everything else goes through Pillow, and its colours are converted one strip at a time, so that a worker stays
under 1.5 GiB: 80 megapixels of a palette image take 80 MB, and as RGBA four times that, once more for every copy.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from mmflow.core.errors import CorruptArtifactError
from mmflow.imaging.header import JPEGS, TURNS, Header, count_png_frames, one_line
from mmflow.sources.reasons import Reason, Rejected

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)
Colour = tuple[int, int, int]

WHITE = (255, 255, 255)
STRIP_PIXELS = 1 << 22
DEEP_GREYS = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", *DEEP_GREYS)
WHITE_IS_ZERO = 0  # TIFF's photometric interpretation

EXIF = b"Exif\0\0"
EXIF_WITHIN = 4096  # bytes from the start of a file; cameras write it first
# Decoding at seven eighths takes 8 to 20% longer than in full (measured from 96 to 1500 pixels a side), so that scale
# is skipped.
LEAST_FACTOR = 1.3
# Pillow reduces a large image to this many times the size asked, by averaging whole pixels; an antialiased cubic does
# the rest. For drawings this is 50 dB from a full Lanczos in half its time (OpenCV's area filter: 45 dB).
REDUCING_GAP = 2
QUARTER_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
# Most canvas pixels × frames of an animation, some ten seconds of decoding. A frame costs at least `FRAME_PIXELS`.
MAX_ANIMATION_PIXELS = 1_000_000_000
FRAME_PIXELS = 10_000


# --- stored pictures --------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A stored picture with its header read. Width and height are those of the upright picture, in pixels."""

    body: bytes
    extension: str
    width: int
    height: int
    orientation: int  # EXIF, 1 to 8: what remains to be applied
    image: Image.Image | None  # opened by Pillow, no pixel decoded; None: a plain JPEG


def open_picture(body: bytes, extension: str) -> Picture:
    """The picture's header, no pixel decoded. Raises CorruptArtifactError if there is none."""
    orientation, plain = 1, False
    if extension in ("jpg", "jpeg"):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(body)
        except ValueError:  # not strictly valid, such as stray bytes after a marker: Pillow is more tolerant
            colours = "unknown"
        plain = colours in ("YCbCr", "Gray", "RGB")  # Pillow decodes CMYK
        if plain and body.find(EXIF, 0, EXIF_WITHIN) < 0:
            return Picture(body, extension, width, height, orientation, None)
    try:
        image = Image.open(io.BytesIO(body))
        if image.format in ("JPEG", "MPO", "WEBP"):  # for a PNG, Pillow would decode all pixels to look for EXIF
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as in `probe`
        raise _damaged(body, extension, error) from error
    orientation = orientation if orientation in TURNS else 1
    width, height = image.size[::-1] if TURNS[orientation][0] % 2 else image.size
    return Picture(body, extension, width, height, orientation, None if plain else image)


def read_pixels(picture: Picture, least_side: int, share: tuple[float, float] = (1.0, 1.0)) -> Pixels:
    """The upright picture, (height, width, 3) uint8, transparent parts white; a JPEG is shrunk while it is decoded.

    A part of the picture with this `share` of its width and height keeps at least `least_side` pixels each way, if it
    has as many. libjpeg scales by eighths in the frequency domain (an inverse transform of fewer coefficients per
    block): a quarter of the pixels takes a third of the time, and details too fine for the scale are cut off, not
    aliased. Raises CorruptArtifactError.
    """
    least_width, least_height = math.ceil(least_side / share[0]), math.ceil(least_side / share[1])
    if TURNS[picture.orientation][0] % 2:
        least_width, least_height = least_height, least_width
    try:
        if picture.image is None:
            pixels = _decode_plain_jpeg(picture.body, least_width, least_height)
        else:
            picture.image.load()
            pixels = flatten(solid(picture.image, WHITE), WHITE)
    except Exception as error:
        raise _damaged(picture.body, picture.extension, error) from error
    if picture.orientation == 1:
        return pixels
    return np.asarray(_upright(Image.fromarray(pixels), picture.orientation))


def decode(body: bytes, extension: str, least_side: int) -> Pixels:
    """The upright picture, both sides at least `least_side` if it has as many. Raises CorruptArtifactError."""
    return read_pixels(open_picture(body, extension), least_side)


def _decode_plain_jpeg(body: bytes, least_width: int, least_height: int) -> Pixels:
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            body, min_height=least_height, min_width=least_width, min_factor=LEAST_FACTOR
        )
    except ValueError:  # as in `open_picture`; Pillow refuses a truncated file too
        with Image.open(io.BytesIO(body)) as image:
            return np.asarray(image.convert("RGB"))
    return pixels


def _damaged(body: bytes, extension: str, error: Exception) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"a .{extension} of {len(body)} bytes cannot be decoded ({one_line(error)}); "
        "set loader.on_corrupt: skip to go on without it"
    )


# --- source images ----------------------------------------------------------------------------------------------------


def decode_source(data: bytes, header: Header, side: int, background: Colour = WHITE) -> Image.Image:
    """The upright image as RGB, or RGBa before its background (`flatten`); a large one reduced, no side below `side`.

    The header's image is used up. Raises Rejected if the file ends early or its pixels cannot be decoded.
    """
    pixels = decode_source_jpeg(data, header, side) if header.format in JPEGS and header.mode in ("RGB", "L") else None
    if pixels is not None:
        return _upright(Image.fromarray(pixels), header.orientation)
    with _rejecting_damage():
        image = header.image
        image.draft(None, (side, side))  # lets a JPEG shrink while it is decoded
        image.load()
        picture = solid(image, background, _reduction(image, side))
        if picture is not image:
            image.close()
        return _upright(picture, header.orientation)


def decode_source_jpeg(data: bytes, header: Header, side: int = 0) -> Pixels | None:
    """A JPEG's pixels as stored; None if it is not strictly valid: Pillow tells stray bytes from a truncated file."""
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (header.height, header.width):
            return None  # the bounds were checked against Pillow's reading of the header
        return np.asarray(simplejpeg.decode_jpeg(data, min_height=side, min_width=side))
    except ValueError:
        return None


def decode_frames(
    data: bytes, header: Header, most: int, side: int, background: Colour = WHITE
) -> Iterator[Image.Image]:
    """At most `most` evenly spaced frames of an animation, each as `decode_source` gives a still image.

    A frame stores what changed since the one before, so reaching the last one decodes all. Raises Rejected if that
    would take too long, if frames that the header promises are missing, or if a frame is damaged.
    """
    image, factor = header.image, _reduction(header.image, side)
    with _rejecting_damage():
        first = int(bool(image.info.get("default_image")))  # an APNG may have a still picture before the animation
        num_frames = int(getattr(image, "n_frames", 1)) - first
        # For other formats, Pillow or the decoder counts the frames themselves.
        if image.format == "PNG" and (there := count_png_frames(data)) < num_frames:
            raise Rejected(Reason.image_truncated, f"{there} frames of the {num_frames} that its header promises")
        numbers = evenly_spaced(num_frames, most)
        width, height = image.size
        if (numbers[-1] + 1) * max(width * height, FRAME_PIXELS) > MAX_ANIMATION_PIXELS:
            what = f"{numbers[-1] + 1} frames of {width}×{height} pixels to decode"
            raise Rejected(Reason.image_too_large, f"{what}; max_frames=1 would keep only the first")
        for number in numbers:
            image.seek(first + number)
            if image.size != (width, height):  # a GIF frame beyond the screen, to which Pillow adapts
                grown = f"frame {number} makes it {image.width}×{image.height} pixels instead of {width}×{height}"
                raise Rejected(Reason.image_unsupported, grown)
            image.load()
            yield _upright(solid(image, background, factor), header.orientation)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`: the first of each of that many equal spans."""
    kept = min(count, most)
    return [number * count // kept for number in range(kept)]


def _reduction(image: Image.Image, side: int) -> int:
    return max(1, min(image.size) // (REDUCING_GAP * side))


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    turns, flip = TURNS[orientation]
    turned = picture.transpose(QUARTER_TURNS[turns]) if turns else picture
    return turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else turned


@contextlib.contextmanager
def _rejecting_damage() -> Iterator[None]:
    try:
        yield
    except (Rejected, MemoryError):  # a lack of memory is this machine's problem; the verdict must not depend on it
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.image_too_large, str(error)) from error
    except Exception as error:  # as in `probe`
        raise Rejected(Reason.image_truncated, one_line(error)) from error


# --- colours ----------------------------------------------------------------------------------------------------------


def is_supported(image: Image.Image) -> bool:
    """Whether the mode's values have a known range. Floats, 32-bit integers and LAB have none."""
    # The exception: Pillow reads a PPM's greys as 32-bit integers, scaled to 16 bits.
    return image.mode in MODES or (image.mode == "I" and image.format == "PPM")


def solid(image: Image.Image, background: Colour, factor: int = 1) -> Image.Image:
    """A loaded image as RGB, or as RGBa if it has transparency, with each square of `factor` pixels averaged into one.

    RGBa is premultiplied: an average then shows what is seen, hidden colours do not bleed out, and the background can
    be added after the image is small. The last square of a row may be narrower. `background` replaces the transparent
    value of 16-bit greys.
    """
    width, height = image.size
    greys = _levels(image) if image.mode.startswith("I") else None
    rows = max(1, STRIP_PIXELS // width // factor) * factor
    whole: Image.Image | None = None
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        layer = _layer(strip) if greys is None else _from_deep_grey(strip, greys, background)
        reduced = layer.reduce(factor) if factor > 1 else layer
        if rows >= height:
            return reduced
        whole = whole or Image.new(reduced.mode, (reduced.width, -(-height // factor)))
        whole.paste(reduced, (0, top // factor))
    assert whole is not None
    return whole


def flatten(picture: Image.Image, background: Colour) -> Pixels:
    """The result of `solid` over the background, (height, width, 3) uint8."""
    if picture.mode == "RGB":
        return np.asarray(picture)
    layer = picture.convert("RGBA")
    opaque = Image.new("RGB", layer.size, background)
    opaque.paste(layer, mask=layer)
    return np.asarray(opaque)


def _layer(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:  # a 16-bit PNG, which Pillow has reduced to 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image.convert("RGBA").convert("RGBa") if image.mode != "RGBa" else image


def _levels(image: Image.Image) -> Pixels:
    """(65536, 3): the colour of each value of a deep grey, from its upper eight bits. Pillow would clip at 255."""
    values = np.arange(65536)
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]  # Pillow does not scale 12-bit values
        values = np.minimum(values << max(0, 16 - bits), 65535)
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:  # Pillow ignores this tag for 16 bits
            values = 65535 - values
    return np.repeat((values >> 8).astype(np.uint8)[:, None], 3, axis=1)


def _from_deep_grey(image: Image.Image, levels: Pixels, background: Colour) -> Image.Image:
    deep = np.clip(np.asarray(image), 0, 65535)
    result = levels[deep]
    if "transparency" in image.info:
        result[deep == image.info["transparency"]] = background
    return Image.fromarray(result)
