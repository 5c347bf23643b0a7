"""Any image file to small RGB ones: bytes → array → bytes, and a reason wherever that cannot be.

JPEG goes through simplejpeg, which shrinks while it decodes (1600×1200 → 256 px: 156 images/s a core; Pillow in full:
26). Everything else goes through Pillow, held once and shrunk in strips.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from mmflow.imaging.colour import RGB, Colour, flatten, solid
from mmflow.imaging.config import ImageConfig
from mmflow.imaging.frames import animation_frames, count_frames, evenly_spaced
from mmflow.imaging.hashes import clip_pixel_hash, pixel_hash, thumbnail, thumbnail_hash
from mmflow.imaging.header import JPEGS, TURNS, Header, Size, check_bounds, one_line, probe
from mmflow.sources.reasons import Reason, Rejected

EXTENSIONS = {"jpeg": "jpg", "webp": "webp"}
STORED_FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}  # ours → Pillow's
WHITE = (255, 255, 255)
FULL_COLOUR_QUALITY = 90  # from here on colour is kept at full resolution, as ImageMagick does
# Most pixels of a side that an encoder takes: libjpeg's JPEG_MAX_DIMENSION, the 14 bits of WebP.
ENCODER_SIDES = {"jpeg": 65_500, "webp": 16_383}
# Whole pixels are averaged down to so many times the size asked, then resampled by an antialiased cubic: for drawings
# that is 50 dB from Lanczos in full at half its time (OpenCV's area filter: 45 dB).
REDUCING_GAP = 2
FILTER = Image.Resampling.BICUBIC
QUARTER_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedImage:
    """An image or a clip as it goes into a tar: files of one format and one size."""

    data: bytes
    extension: str
    width: int
    height: int
    frames: tuple[bytes, ...]  # those of a clip that come after `data`
    pixel_hash: int
    perceptual_hash: int


def prepare_images(bodies: Sequence[bytes], settings: ImageConfig) -> PreparedImage:
    """The file of an image or an animation, or the files of a clip's frames, as they are to be stored.

    A clip keeps at most `max_frames` frames, evenly spaced, all of the first one's size; its pixel hash covers them all
    and its perceptual hash is that of their mean. Raises Rejected for what is no image, is damaged, or is out of
    bounds; bounds are checked before a pixel is decoded.
    """
    files, pixel_hashes, thumbnails = [], [], []
    size = (0, 0)
    for file, image in _prepared(bodies, settings):
        files.append(file)
        pixel_hashes.append(pixel_hash(image))
        thumbnails.append(thumbnail(image))
        size = (image.shape[1], image.shape[0])
    return PreparedImage(
        data=files[0],
        extension=EXTENSIONS[settings.format],
        width=size[0],
        height=size[1],
        frames=tuple(files[1:]),
        pixel_hash=clip_pixel_hash(pixel_hashes),
        perceptual_hash=thumbnail_hash(sum(thumbnails[1:], thumbnails[0]) // len(thumbnails)),
    )


def stored_size(size: Size, resize: str, side: int) -> Size:
    """The size that a resize policy gives an upright image; never a larger one."""
    width, height = size
    shortest, longest = min(size), max(size)
    if resize == "crop":
        return (min(shortest, side), min(shortest, side))
    aim = {"none": longest, "shortest": shortest, "longest": longest}[resize]
    if resize == "none" or aim <= side:
        return size
    return (max(1, round(width * side / aim)), max(1, round(height * side / aim)))


def decode(data: bytes, header: Header, side: int, background: Colour = WHITE) -> RGB:
    """The upright image over the background, (height, width, 3) uint8; a large one reduced, no side below `side`.

    The header's image is used up. Raises Rejected where the file ends early or its pixels cannot be decoded.
    """
    return flatten(_decode(data, header, side, background), background)


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """The picture at that size: what its shape has too much is cut off on both sides alike."""
    width, height = picture.size
    if (width, height) == size:
        return picture
    scale = max(size[0] / width, size[1] / height)
    across, down = min(width, size[0] / scale), min(height, size[1] / scale)
    left, top = (width - across) / 2, (height - down) / 2
    if scale == 1:
        return picture.crop((int(left), int(top), int(left) + size[0], int(top) + size[1]))
    return picture.resize(size, FILTER, (left, top, left + across, top + down), reducing_gap=REDUCING_GAP)


def encode(image: RGB, format: str, quality: int) -> bytes:
    """JPEG or WebP of an image (height, width, 3) uint8."""
    if format == "jpeg":
        subsampling = "444" if quality >= FULL_COLOUR_QUALITY else "420"
        return bytes(simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling=subsampling))
    target = io.BytesIO()
    Image.fromarray(image).save(target, "WEBP", quality=quality, method=4)
    return target.getvalue()


def _prepared(bodies: Sequence[bytes], settings: ImageConfig) -> Iterator[tuple[bytes, RGB]]:
    """The files to be stored, each with its pixels, one after another: a clip's frames are never all in memory."""
    chosen = evenly_spaced(len(bodies), settings.max_frames)
    size = None
    for number in chosen:
        try:
            header = probe(bodies[number])
            check_bounds(header, settings)
            size = size or _stored_size(header, settings)
            if len(bodies) == 1 and header.animated and settings.max_frames > 1:
                yield from _animation(bodies[0], header, size, settings)
            else:
                yield _still(bodies[number], header, size, settings)
        except Rejected as rejected:
            if len(bodies) == 1:
                raise
            detail = f"frame {number + 1} of {len(bodies)}: {rejected.detail}"
            raise Rejected(rejected.reason, detail) from rejected


def _stored_size(header: Header, settings: ImageConfig) -> Size:
    size = stored_size(header.upright_size, settings.resize, settings.side)
    if max(size) > ENCODER_SIDES[settings.format]:
        most = f"{settings.format} has sides of at most {ENCODER_SIDES[settings.format]}"
        raise Rejected(Reason.image_too_large, f"{size[0]}×{size[1]} pixels once resized; {most}")
    return size


def _still(data: bytes, header: Header, size: Size, settings: ImageConfig) -> tuple[bytes, RGB]:
    if settings.keep_conforming and _conforms(header, size, settings.format):
        image = _decode_jpeg(data, header) if header.format == "JPEG" else decode(data, header, max(size))
        if image is not None:
            return data, image
    picture = _decode(data, header, _needed_side(header.upright_size, size), settings.background)
    image = flatten(fit(picture, size), settings.background)
    return encode(image, settings.format, settings.quality), image


def _animation(data: bytes, header: Header, size: Size, settings: ImageConfig) -> Iterator[tuple[bytes, RGB]]:
    factor = _factor(header.image, _needed_side(header.upright_size, size))
    with _damage_named():
        numbers = evenly_spaced(count_frames(header.image, data), settings.max_frames)
        for frame in animation_frames(header.image, numbers):
            picture = _upright(solid(frame, settings.background, factor), header.orientation)
            image = flatten(fit(picture, size), settings.background)
            yield encode(image, settings.format, settings.quality), image


def _conforms(header: Header, size: Size, format: str) -> bool:
    fits = header.upright_size == size and header.orientation == 1
    return fits and header.format == STORED_FORMATS[format] and header.mode == "RGB" and not header.animated


def _needed_side(source: Size, size: Size) -> int:
    """The least shorter side from which `fit` need not enlarge."""
    scale = max(size[0] / source[0], size[1] / source[1])
    return min(min(source), round(min(source) * scale))


def _factor(image: Image.Image, side: int) -> int:
    return max(1, min(image.size) // (REDUCING_GAP * side))


def _decode_jpeg(data: bytes, header: Header, side: int = 0) -> RGB | None:
    """None for a file that is not JPEG to the letter."""
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (header.height, header.width):
            return None  # the bounds were checked on Pillow's reading of the header
        return np.asarray(simplejpeg.decode_jpeg(data, min_height=side, min_width=side))
    except ValueError:
        return None


def _decode(data: bytes, header: Header, side: int, background: Colour) -> Image.Image:
    """As `decode`, but before the background is laid under it."""
    image = _decode_jpeg(data, header, side) if header.format in JPEGS and header.mode in ("RGB", "L") else None
    if image is not None:  # strict about stray bytes; Pillow tells them from a file cut short
        return _upright(Image.fromarray(image), header.orientation)
    with _damage_named():
        return _upright(_decode_with_pillow(header.image, side, background), header.orientation)


def _decode_with_pillow(image: Image.Image, side: int, background: Colour) -> Image.Image:
    image.draft(None, (side, side))  # a JPEG then shrinks while it is decoded
    image.load()
    picture = solid(image, background, _factor(image, side))
    if picture is not image:
        image.close()
    return picture


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    turns, flip = TURNS[orientation]
    turned = picture.transpose(QUARTER_TURNS[turns]) if turns else picture
    return turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else turned


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except (Rejected, MemoryError):  # short of memory is this machine's trouble; the verdict must not depend on it
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.image_too_large, str(error)) from error
    except Exception as error:  # as in `probe`
        raise Rejected(Reason.image_truncated, one_line(error)) from error
