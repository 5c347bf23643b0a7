"""Any image file to a small RGB one: bytes → array → bytes, and a reason wherever that cannot be.

The header is read first, so that a decompression bomb costs microseconds and never its pixels. JPEG goes through
simplejpeg, which shrinks while it decodes (1600×1200 → 256 px: 156 images/s a core; Pillow in full: 26).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from mmflow.ingest.reasons import Reason, Rejected

RGB = npt.NDArray[np.uint8]  # (height, width, 3)

# Named, because Pillow would otherwise try every format that it knows, Ghostscript for EPS among them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with more of them behind it, which Pillow finds by itself
EXTENSIONS = {"jpeg": "jpg", "webp": "webp"}
BACKGROUND = (255, 255, 255)
FULL_COLOUR_QUALITY = 90  # from here on colour is kept at full resolution, as ImageMagick does
# EXIF orientation → quarter turns against the clock, then a left-right flip.
TURNS = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What an image file says of itself; `width` and `height` are pixels as stored, before its orientation."""

    image: Image.Image = field(repr=False, compare=False)  # opened, not a pixel decoded
    format: str
    mode: str  # Pillow's
    width: int
    height: int
    orientation: int  # EXIF, 1 to 8
    animated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """An image file as it goes into a tar."""

    data: bytes
    extension: str
    width: int
    height: int


def prepare_image(
    data: bytes, *, side: int, max_pixels: int, min_side: int, max_aspect: float, format: str, quality: int
) -> EncodedImage:
    """A file of any supported format as a JPEG or WebP whose shortest side is at most `side` pixels.

    Raises Rejected for what is no image, is damaged, or is out of bounds; bounds are checked before decoding.
    """
    header = probe(data)
    check_bounds(header, max_pixels=max_pixels, min_side=min_side, max_aspect=max_aspect)
    image = resize(decode(data, header, side), side)
    encoded = encode(image, format, quality)
    return EncodedImage(data=encoded, extension=EXTENSIONS[format], width=image.shape[1], height=image.shape[0])


def probe(data: bytes) -> Header:
    """The header, without decoding a pixel. Raises Rejected where there is none or it lies past Pillow's own bound."""
    if not data:
        raise Rejected(Reason.image_truncated, "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_bounds` decides, not Pillow
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            animated = image.format not in JPEGS and bool(getattr(image, "is_animated", False))
            # Without this look, a PNG's `getexif` decodes the pixels in search of a chunk behind them.
            searchable = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if searchable else 1
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.image_too_large, str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected(Reason.image_not_an_image, f"begins with {data[:12].hex(' ')}") from error
    except Exception as error:  # Pillow's parsers raise whatever they trip over: struct.error, KeyError, SyntaxError …
        raise Rejected(Reason.image_truncated, f"damaged header: {_one_line(error)}") from error
    return Header(
        image=image,
        format=image.format or "",
        mode=image.mode,
        width=image.width,
        height=image.height,
        orientation=orientation if orientation in TURNS else 1,
        animated=animated,
    )


def check_bounds(header: Header, *, max_pixels: int, min_side: int, max_aspect: float) -> None:
    """Raises Rejected for an image outside the bounds, or of several frames."""
    size = f"{header.width}×{header.height}"
    if header.width * header.height > max_pixels:
        raise Rejected(Reason.image_too_large, f"{size} pixels, at most {max_pixels} are asked")
    if min(header.width, header.height) < min_side:
        raise Rejected(Reason.image_too_small, f"{size} pixels, a side of at least {min_side} is asked")
    if max(header.width, header.height) > max_aspect * min(header.width, header.height):
        raise Rejected(Reason.image_too_narrow, f"{size} pixels, sides of at most 1:{max_aspect:g} are asked")
    if header.animated:
        raise Rejected(Reason.image_animated, f"{header.format} of several frames")


def decode(data: bytes, header: Header, side: int) -> RGB:
    """The upright image over white, (height, width, 3) uint8; of a JPEG a reduced one, neither side below `side`.

    Raises Rejected where the file ends early or its pixels cannot be decoded.
    """
    image = None
    if header.format in JPEGS and header.mode in ("RGB", "L"):
        with contextlib.suppress(ValueError):  # strict about stray bytes too; Pillow tells them from a file cut short
            image = simplejpeg.decode_jpeg(data, min_height=side, min_width=side)
    if image is None:
        image = _decode_with_pillow(header.image)
    turns, flip = TURNS[header.orientation]
    upright = np.rot90(image, turns) if turns else image
    return np.ascontiguousarray(upright[:, ::-1] if flip else upright)


def resize(image: RGB, side: int) -> RGB:
    """The image with its shortest side at `side` pixels; unchanged where it is that small already."""
    height, width = image.shape[:2]
    shortest = min(height, width)
    if shortest <= side:
        return image
    size = (max(side, round(width * side / shortest)), max(side, round(height * side / shortest)))
    # The gap of 3 first averages whole pixels: three times quicker on large images, and no eye sees it.
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def encode(image: RGB, format: str, quality: int) -> bytes:
    """JPEG or WebP of an image (height, width, 3) uint8."""
    if format == "jpeg":
        subsampling = "444" if quality >= FULL_COLOUR_QUALITY else "420"
        return bytes(simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling=subsampling))
    target = io.BytesIO()
    Image.fromarray(image).save(target, "WEBP", quality=quality, method=4)
    return target.getvalue()


def _decode_with_pillow(image: Image.Image) -> RGB:
    try:
        image.load()
        return np.asarray(_to_rgb(image))
    except (Rejected, MemoryError):  # short of memory is this machine's trouble; the verdict must not depend on it
        raise
    except Exception as error:  # as in `probe`
        raise Rejected(Reason.image_truncated, _one_line(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes over the background, in RGB."""
    if image.mode.startswith("I"):  # 16 bits and more: Pillow's own conversion cuts at 255 instead of scaling
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Rejected(Reason.image_unsupported, "floating-point pixels have no agreed range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() == (255, 255):
            return layer.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*BACKGROUND, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
