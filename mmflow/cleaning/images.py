"""Any image file to the small RGB files that are stored, or the reason why it is rejected."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import simplejpeg
from PIL import Image

from mmflow.cleaning.config import ImageConfig
from mmflow.imaging.decode import (
    REDUCING_GAP,
    WHITE,
    Pixels,
    decode_frames,
    decode_source,
    decode_source_jpeg,
    evenly_spaced,
    flatten,
    is_supported,
)
from mmflow.imaging.hashes import clip_pixel_hash, pixel_hash, thumbnail, thumbnail_hash
from mmflow.imaging.header import Header, Size, probe
from mmflow.sources.reasons import Reason, Rejected

EXTENSIONS = {"jpeg": "jpg", "webp": "webp"}
STORED_FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}  # ours → Pillow's
FULL_COLOUR_QUALITY = 90  # from here on colour keeps its full resolution, as in ImageMagick
# Most pixels of a side that an encoder takes: libjpeg's JPEG_MAX_DIMENSION, the 14 bits of WebP.
ENCODER_SIDES = {"jpeg": 65_500, "webp": 16_383}
FILTER = Image.Resampling.BICUBIC
# Peak bytes per pixel of decoders that need more than the pixels once and a strip, measured as the growth of a process.
# The bound keeps a Ray worker of 250 MiB under 1.5 GiB.
DECODER_BYTES = {"WEBP": 17, "AVIF": 16, "JPEG2000": 25}
ANIMATION_BYTES = 18  # the canvas, the previous one, the disposed area, and the copy that is handed out
MAX_DECODER_BYTES = 1_200_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedImage:
    """An image or a clip as it is stored in a tar: files of one format and one size."""

    data: bytes
    extension: str
    width: int
    height: int
    frames: tuple[bytes, ...]  # a clip's frames after `data`
    pixel_hash: int
    perceptual_hash: int


def prepare_images(bodies: Sequence[bytes], settings: ImageConfig) -> PreparedImage:
    """The stored form of an image, of an animation, or of a clip given as one file per frame.

    A clip keeps at most `max_frames` evenly spaced frames, all of the first one's size. Its pixel hash covers all of
    them and its perceptual hash is that of their mean. Raises Rejected for what is no image, is damaged or out of
    bounds; the bounds are checked before a pixel is decoded.
    """
    files, pixel_hashes, thumbnails = [], [], []
    for file, pixels in _files(bodies, settings):
        files.append(file)
        pixel_hashes.append(pixel_hash(pixels))
        thumbnails.append(thumbnail(pixels))
        height, width, _ = pixels.shape
    return PreparedImage(
        data=files[0],
        extension=EXTENSIONS[settings.format],
        width=width,
        height=height,
        frames=tuple(files[1:]),
        pixel_hash=clip_pixel_hash(pixel_hashes),
        perceptual_hash=thumbnail_hash(sum(thumbnails[1:], thumbnails[0]) // len(thumbnails)),
    )


def check_bounds(header: Header, settings: ImageConfig) -> None:
    """Raises Rejected for an image outside the bounds, or with pixel values that have no known range."""
    size = f"{header.width}×{header.height}"
    if header.width * header.height > settings.max_pixels:
        raise Rejected(Reason.image_too_large, f"{size} pixels, at most {settings.max_pixels} are allowed")
    if min(header.width, header.height) < settings.min_side:
        raise Rejected(Reason.image_too_small, f"{size} pixels, each side needs at least {settings.min_side}")
    if max(header.width, header.height) > settings.max_aspect * min(header.width, header.height):
        raise Rejected(Reason.image_too_narrow, f"{size} pixels, at most 1:{settings.max_aspect:g} is allowed")
    if not is_supported(header.image):
        raise Rejected(Reason.image_unsupported, f"{header.format} of mode {header.mode}: its values have no set range")
    pixel_bytes = ANIMATION_BYTES if header.animated else DECODER_BYTES.get(header.format, 0)
    if header.width * header.height * pixel_bytes > MAX_DECODER_BYTES:
        what = f"{size} pixels of {header.format} at {pixel_bytes} bytes each"
        raise Rejected(Reason.image_too_large, f"{what}: a worker has {MAX_DECODER_BYTES} bytes to decode with")


def stored_size(size: Size, resize: str, side: int) -> Size:
    """The size of an upright image after resizing; never larger than it was."""
    width, height = size
    if resize == "crop":
        return (min(width, height, side),) * 2
    length = min(size) if resize == "shortest" else max(size)
    if resize == "none" or length <= side:
        return size
    return (max(1, round(width * side / length)), max(1, round(height * side / length)))


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """The picture at this size. If its shape is another, equal strips are cut off at both ends."""
    width, height = picture.size
    if (width, height) == size:
        return picture
    scale = max(size[0] / width, size[1] / height)
    across, down = min(width, size[0] / scale), min(height, size[1] / scale)
    left, top = (width - across) / 2, (height - down) / 2
    if scale == 1:
        return picture.crop((int(left), int(top), int(left) + size[0], int(top) + size[1]))
    return picture.resize(size, FILTER, (left, top, left + across, top + down), reducing_gap=REDUCING_GAP)


def encode(pixels: Pixels, format: str, quality: int) -> bytes:
    """JPEG or WebP of (height, width, 3) uint8."""
    if format == "jpeg":
        subsampling = "444" if quality >= FULL_COLOUR_QUALITY else "420"
        return bytes(simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=subsampling))
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "WEBP", quality=quality, method=4)
    return target.getvalue()


def _files(bodies: Sequence[bytes], settings: ImageConfig) -> Iterator[tuple[bytes, Pixels]]:
    """The files to store, each with its pixels, one at a time: a clip's frames are never all in memory."""
    size = None
    for number in evenly_spaced(len(bodies), settings.max_frames):
        try:
            header = probe(bodies[number])
            check_bounds(header, settings)
            size = size or _stored_size(header, settings)
            yield from _stored(bodies[number], header, size, settings, animated=header.animated and len(bodies) == 1)
        except Rejected as rejected:
            if len(bodies) == 1:
                raise
            detail = f"frame {number + 1} of {len(bodies)}: {rejected.detail}"
            raise Rejected(rejected.reason, detail) from rejected


def _stored_size(header: Header, settings: ImageConfig) -> Size:
    size = stored_size(header.upright_size, settings.resize, settings.side)
    most = ENCODER_SIDES[settings.format]
    if max(size) > most:
        detail = f"{size[0]}×{size[1]} pixels once resized; a side of {settings.format} has at most {most}"
        raise Rejected(Reason.image_too_large, detail)
    return size


def _stored(
    data: bytes, header: Header, size: Size, settings: ImageConfig, *, animated: bool
) -> Iterator[tuple[bytes, Pixels]]:
    if settings.keep_conforming and _conforms(header, size, settings.format):
        if header.format == "JPEG":
            pixels = decode_source_jpeg(data, header)
        else:
            pixels = flatten(decode_source(data, header, max(size)), WHITE)
        if pixels is not None:
            yield data, pixels
            return
    source = header.upright_size
    scale = max(size[0] / source[0], size[1] / source[1])
    side = min(min(source), round(min(source) * scale))  # of the shorter side, so that `fit` need not enlarge
    if animated and settings.max_frames > 1:
        pictures = decode_frames(data, header, settings.max_frames, side, settings.background)
    else:
        pictures = iter([decode_source(data, header, side, settings.background)])
    for picture in pictures:
        pixels = flatten(fit(picture, size), settings.background)
        yield encode(pixels, settings.format, settings.quality), pixels


def _conforms(header: Header, size: Size, format: str) -> bool:
    fits = header.upright_size == size and header.orientation == 1
    return fits and header.format == STORED_FORMATS[format] and header.mode == "RGB" and not header.animated
