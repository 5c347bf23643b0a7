"""What an image file says about itself, read before any pixel is decoded: refusing a decompression bomb takes
microseconds."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import ExifTags, Image, UnidentifiedImageError

from mmflow.sources.reasons import Reason, Rejected

# Listed explicitly, because Pillow would otherwise try every format it knows, including EPS through Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG followed by more JPEGs; Pillow detects it by itself
CLIPS = ("GIF", "WEBP", "PNG", "AVIF")  # further images of a TIFF or MPO are pages and views: only the first is used
# (start of the file, position, bytes at that position): these tell a damaged image from a file that is no image. BMP's
# two letters prove nothing.
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
# EXIF orientation → counter-clockwise quarter turns, then whether to flip left and right.
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
ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")  # Pillow names the object that it reads from
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Texts and colour profiles. We use none of them, and Pillow refuses a picture that every browser shows if one of them
# unpacks to more than 1 MiB or has a wrong checksum.
PNG_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
PNG_FRAME = b"fcTL"

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The header of an image file. `width` and `height` are pixels as decoded, before the orientation is applied."""

    image: Image.Image = field(repr=False, compare=False)  # opened, no pixel decoded
    format: str
    mode: str  # Pillow's
    width: int
    height: int
    orientation: int  # EXIF, 1 to 8: what remains to be applied
    animated: bool

    @property
    def upright_size(self) -> Size:
        """Width and height once the orientation is applied."""
        return (self.height, self.width) if TURNS[self.orientation][0] % 2 else (self.width, self.height)


def probe(data: bytes) -> Header:
    """The header, without decoding a pixel. Raises Rejected if there is none, or if it exceeds Pillow's own bound."""
    if not data:
        raise Rejected(Reason.image_truncated, "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about bombs, which our own bounds catch, and about tags we never read
            image = Image.open(io.BytesIO(without_notes(data)), formats=FORMATS)
            animated = image.format in CLIPS and bool(getattr(image, "is_animated", False))
            # Pillow turns a TIFF by itself. For a PNG without an early EXIF chunk it would decode all pixels to find
            # a late one.
            has_exif = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.image_too_large, str(error)) from error
    except UnidentifiedImageError as error:
        damaged = any(data.startswith(start) and data[at : at + len(mark)] == mark for start, at, mark in SIGNATURES)
        reason = Reason.image_truncated if damaged else Reason.image_not_an_image
        raise Rejected(reason, f"no image header; the file begins with {data[:12].hex(' ')}") from error
    except Exception as error:  # Pillow's parsers raise anything: struct.error, KeyError, SyntaxError …
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


def one_line(error: Exception) -> str:
    """A parser's error as the detail of a rejection, the same whenever the same file is read."""
    return " ".join(ADDRESS.sub("", f"{type(error).__name__}: {error}").split())[:200]


# --- PNG files: what Pillow does not handle ---------------------------------------------------------------------------


def without_notes(data: bytes) -> bytes:
    """A PNG without its texts and colour profile; any other file unchanged."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, position = [], 0
    for kind, start, end in _png_chunks(data):
        if kind in PNG_NOTES:
            kept.append(data[position:start])
            position = end
    return b"".join([*kept, data[position:]]) if kept else data


def count_png_frames(data: bytes) -> int:
    """The number of animation frames that the file really contains, whatever its header says."""
    return sum(kind == PNG_FRAME for kind, _, _ in _png_chunks(data))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk."""
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], start, end
        start = end
