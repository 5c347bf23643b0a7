"""What an image file says of itself, before a pixel is decoded: a decompression bomb costs microseconds to refuse."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field

from PIL import ExifTags, Image, UnidentifiedImageError

from mmflow.imaging.colour import is_supported
from mmflow.imaging.config import ImageConfig
from mmflow.imaging.png import without_notes
from mmflow.sources.reasons import Reason, Rejected

# Named, because Pillow would otherwise try every format that it knows, Ghostscript for EPS among them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with more of them behind it, which Pillow finds by itself
CLIPS = ("GIF", "WEBP", "PNG", "AVIF")  # the further images of TIFF and MPO are pages and views: the first is the image
# What tells a damaged image from none: the file's start, and a mark at a place. Two letters, as of BMP, tell nothing.
SIGNATURES = (
    (b"\xff\xd8\xff", 0, b""),
    (b"\x89PNG\r\n\x1a\n", 0, b""),
    (b"GIF8", 0, b""),
    (b"RIFF", 8, b"WEBP"),
    (b"II*\0", 0, b""),
    (b"MM\0*", 0, b""),
    (b"", 4, b"ftypavi"),
    (b"", 4, b"jP  \r\n\x87\n"),
)
# What a decoder takes at its peak, in bytes a pixel, where that is more than the pixels once and a strip: measured as
# the growth of a process. The most is what leaves a Ray worker of 250 MiB under 1.5 GiB.
DECODER_BYTES = {"WEBP": 17, "AVIF": 16, "JPEG2000": 25}
ANIMATION_BYTES = 18  # the canvas, the one before it, what is disposed of, and the copy that is handed out
MAX_DECODER_BYTES = 1_200_000_000
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

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What an image file says of itself; `width` and `height` are pixels as decoded, not yet turned upright."""

    image: Image.Image = field(repr=False, compare=False)  # opened, not a pixel decoded
    format: str
    mode: str  # Pillow's
    width: int
    height: int
    orientation: int  # EXIF, 1 to 8: what is still to be done about it
    animated: bool

    @property
    def upright_size(self) -> Size:
        """Width and height once the orientation is applied."""
        return (self.height, self.width) if TURNS[self.orientation][0] % 2 else (self.width, self.height)


def probe(data: bytes) -> Header:
    """The header, without decoding a pixel. Raises Rejected where there is none or it lies past Pillow's own bound."""
    if not data:
        raise Rejected(Reason.image_truncated, "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bomb, on which `check_bounds` decides, or of tags that nobody reads
            image = Image.open(io.BytesIO(without_notes(data)), formats=FORMATS)
            animated = image.format in CLIPS and bool(getattr(image, "is_animated", False))
            # Pillow turns a TIFF by itself, and would decode a PNG's pixels in search of a chunk behind them.
            asked = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if asked else 1
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.image_too_large, str(error)) from error
    except UnidentifiedImageError as error:
        cut = any(data.startswith(start) and data[at : at + len(mark)] == mark for start, at, mark in SIGNATURES)
        reason = Reason.image_truncated if cut else Reason.image_not_an_image
        raise Rejected(reason, f"no header of an image, begins with {data[:12].hex(' ')}") from error
    except Exception as error:  # Pillow's parsers raise whatever they trip over: struct.error, KeyError, SyntaxError …
        raise Rejected(Reason.image_truncated, f"damaged header: {one_line(error)}") from error
    return Header(
        image=image,
        format=image.format or "",
        mode=image.mode,
        width=image.width,
        height=image.height,
        orientation=orientation if orientation in TURNS else 1,
        animated=animated,
    )


def check_bounds(header: Header, settings: ImageConfig) -> None:
    """Raises Rejected for an image outside the bounds, or of pixels that nobody can read."""
    size = f"{header.width}×{header.height}"
    if header.width * header.height > settings.max_pixels:
        raise Rejected(Reason.image_too_large, f"{size} pixels, at most {settings.max_pixels} are asked")
    if min(header.width, header.height) < settings.min_side:
        raise Rejected(Reason.image_too_small, f"{size} pixels, a side of at least {settings.min_side} is asked")
    if max(header.width, header.height) > settings.max_aspect * min(header.width, header.height):
        raise Rejected(Reason.image_too_narrow, f"{size} pixels, sides of at most 1:{settings.max_aspect:g} are asked")
    if not is_supported(header.image):
        raise Rejected(Reason.image_unsupported, f"{header.format} of mode {header.mode}, values without agreed range")
    a_pixel = ANIMATION_BYTES if header.animated else DECODER_BYTES.get(header.format, 0)
    if header.width * header.height * a_pixel > MAX_DECODER_BYTES:
        what = f"{size} pixels of {header.format} at {a_pixel} bytes each"
        raise Rejected(Reason.image_too_large, f"{what}: a worker has {MAX_DECODER_BYTES} bytes to decode with")


def one_line(error: Exception) -> str:
    """A parser's complaint as a detail of a rejection."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
