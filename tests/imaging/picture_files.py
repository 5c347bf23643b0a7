"""Image files of every kind, good and bad, made in memory."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

RGB = npt.NDArray[np.uint8]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def gradient(height: int, width: int) -> RGB:
    """(height, width, 3): smooth, and different at every corner."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def file_of(image: Image.Image | RGB, format: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(target, format, **options)  # type: ignore[arg-type]
    return target.getvalue()


def clip_of(frames: Sequence[Image.Image], format: str, **options: object) -> bytes:
    return file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)


def reds(levels: Iterable[int], width: int = 64, height: int = 48) -> list[Image.Image]:
    """A frame of plain red for each level, so that one pixel identifies the frame."""
    return [Image.new("RGB", (width, height), (level, 0, 0)) for level in levels]


def opened(data: bytes) -> npt.NDArray[np.int64]:
    """What any viewer would see in a stored file, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, colour: int, depth: int, pixels: Iterable[bytes], *chunks: bytes) -> bytes:
    """A PNG of any colour type and depth from its rows, with more chunks before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    packer = zlib.compressobj(1)
    packed = b"".join([*(packer.compress(b"\0" + row) for row in pixels), packer.flush()])
    return SIGNATURE + head + b"".join(chunks) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def gif(width: int, height: int, frame_sizes: Iterable[tuple[int, int]]) -> bytes:
    """A GIF of nearly no bytes; its frames may be larger than its screen."""
    frames = [b"\x2c" + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02\x02\x4c\x01\x00" for size in frame_sizes]
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6) + b"".join(frames) + b";"


def overwrite(data: bytes, position: int, patch: bytes) -> bytes:
    return data[:position] + patch + data[position + len(patch) :]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes with a header that claims this size."""
    return png(width, height, 2, 8, [])


def tiff(width: int, height: int, bits: int, photometric: int, pixels: bytes) -> bytes:
    """A TIFF of one channel, little-endian, as scanners write them and Pillow cannot."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(pixels))])
    directory = struct.pack("<H", len(tags) + 1) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def ycck(image: RGB) -> bytes:
    """A JPEG as Photoshop writes it: inverted CMYK, converted to luma and chroma."""
    cmyk = np.asarray(Image.fromarray(image).convert("CMYK"))
    ycc = np.asarray(Image.fromarray(cmyk[..., :3].copy()).convert("YCbCr"))
    # Pillow inverts all four channels when it writes, so three are restored.
    stored = np.dstack([255 - ycc, cmyk[..., 3]])
    data = file_of(Image.frombytes("CMYK", image.shape[1::-1], stored.tobytes()), "JPEG", quality=95)
    adobe = data.index(b"Adobe")
    return data[: adobe + 11] + b"\x02" + data[adobe + 12 :]
