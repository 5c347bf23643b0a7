"""Headers: bounds are checked before a pixel is decoded, so a decompression bomb costs next to nothing."""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from mmflow.cleaning.config import ImageConfig
from mmflow.cleaning.images import check_bounds
from mmflow.imaging.header import probe, without_notes
from mmflow.sources.reasons import Reason, Rejected
from tests.imaging.picture_files import bomb, chunk, file_of, gradient, png, reds, with_chunk


def rejection(data: bytes, **settings: object) -> Reason:
    with pytest.raises(Rejected) as rejected:
        check_bounds(probe(data), ImageConfig(**settings))  # type: ignore[arg-type]
    assert "\n" not in rejected.value.detail
    assert len(rejected.value.detail) < 300
    return rejected.value.reason


def gif_bomb() -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", 65_535, 65_535)
        + b"\x80\0\0"
        + bytes(6)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


def webp_bomb(side: int = 16_383) -> bytes:
    body = file_of(reds([1])[0], "WEBP", lossless=True)
    return body[:21] + struct.pack("<I", side - 1 | (side - 1) << 14) + body[25:]


def tiff_bomb() -> bytes:
    body = file_of(reds([1], 50, 70)[0], "TIFF")
    for side, tag in ((50, 256), (70, 257)):
        place = body.index(struct.pack("<HHI", tag, 4, 1))
        assert struct.unpack_from("<I", body, place + 8) == (side,)
        body = body[: place + 8] + struct.pack("<I", 1_000_000) + body[place + 12 :]
    return body


def jpeg_bomb() -> bytes:
    body = file_of(reds([1])[0], "JPEG")
    frame = body.index(b"\xff\xc0")
    return body[: frame + 5] + struct.pack(">HH", 65_000, 65_000) + body[frame + 9 :]


def jpeg2000_bomb() -> bytes:
    body = file_of(reds([1])[0], "JPEG2000")
    sizes = body.index(b"\xff\x51") + 6
    head = body.index(b"ihdr") + 4
    body = body[:sizes] + struct.pack(">II", 30_000, 30_000) + body[sizes + 8 :]
    return body[:head] + struct.pack(">II", 30_000, 30_000) + body[head + 8 :]


def avif_bomb() -> bytes:
    body = file_of(reds([1])[0], "AVIF")
    extent = body.index(b"ispe") + 8
    return body[:extent] + struct.pack(">II", 30_000, 30_000) + body[extent + 8 :]


def bmp_bomb() -> bytes:
    body = file_of(reds([1])[0], "BMP")
    return body[:18] + struct.pack("<ii", 60_000, 60_000) + body[26:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: bomb(30_000, 30_000),  # past Pillow's own limit
        lambda: bomb(12_000, 12_000),  # past ours
        lambda: bomb(2**31 - 1, 2**31 - 1),
        jpeg_bomb,
        gif_bomb,
        webp_bomb,
        tiff_bomb,
        jpeg2000_bomb,
        bmp_bomb,
        lambda: b"P6 40000 40000 255\n",
    ],
)
def test_bomb_costs_its_header_only(make: Callable[[], bytes]) -> None:
    data = make()
    rejection(data)
    start = time.process_time()
    for _ in range(10):
        assert rejection(data) is Reason.image_too_large
    assert (time.process_time() - start) / 10 < 0.05


def test_bomb_of_avif_is_refused_by_its_own_decoder() -> None:
    assert rejection(avif_bomb()) in (Reason.image_too_large, Reason.image_truncated)


def test_bounds() -> None:
    assert rejection(file_of(Image.new("RGB", (3, 3)))) is Reason.image_too_small
    assert rejection(file_of(Image.new("RGB", (300, 10))), min_side=8) is Reason.image_too_narrow
    assert rejection(file_of(Image.new("RGB", (30_000, 16)))) is Reason.image_too_narrow
    check_bounds(probe(file_of(Image.new("RGB", (30_000, 16)))), ImageConfig(max_aspect=2_000))
    assert rejection(file_of(gradient(100, 100)), max_pixels=9_999) is Reason.image_too_large
    check_bounds(probe(file_of(gradient(100, 100))), ImageConfig(max_pixels=10_000, max_aspect=1, min_side=100))


def test_a_decoder_s_memory_is_bounded_too() -> None:
    assert rejection(webp_bomb(9_000), max_pixels=100_000_000) is Reason.image_too_large
    check_bounds(probe(webp_bomb(8_000)), ImageConfig())


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(gradient(32, 32)[..., 0].astype(np.float32)),
        Image.fromarray(gradient(32, 32)[..., 0].astype(np.int32)),
        Image.new("LAB", (32, 32)),
    ],
)
def test_values_without_agreed_range_are_refused(image: Image.Image) -> None:
    assert rejection(file_of(image, "TIFF")) is Reason.image_unsupported


def test_files_that_are_no_images_are_distinguished_from_damaged_ones() -> None:
    for data in (b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 100, b"BMW", b"P"):
        assert rejection(data) is Reason.image_not_an_image
    assert rejection(b"") is Reason.image_truncated
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF"):
        data = file_of(gradient(64, 64), format)
        assert rejection(data[:16]) is Reason.image_truncated, format


def test_texts_in_a_png_are_harmless() -> None:
    picture = file_of(gradient(32, 48))
    huge = zlib.compress(bytes(50_000_000))
    for kind, body in {
        b"zTXt": b"Comment\0\0" + huge,
        b"iCCP": b"icc\0\0" + huge,
        b"iTXt": b"Comment\0\1\0\0\0" + huge,
        b"tEXt": b"Comment\0" + bytes(3_000_000),
    }.items():
        for data in (with_chunk(picture, kind, body), picture[:-12] + chunk(kind, body) + picture[-12:]):
            start = time.process_time()
            header = probe(data)
            assert time.process_time() - start < 0.05
            assert np.array_equal(np.asarray(header.image.convert("RGB")), gradient(32, 48))
            assert without_notes(data) == picture
    assert without_notes(picture) is picture
    assert without_notes(picture[:50]) == picture[:50]
    assert without_notes(b"GIF89a") == b"GIF89a"


def test_absurd_tags_of_a_tiff_cost_nothing() -> None:
    body = file_of(gradient(32, 48), "TIFF")
    directory = struct.unpack_from("<I", body, 4)[0]
    for place in range(directory + 2, len(body) - 12, 12):
        for count in (0, 2**31, 2**32 - 1):
            absurd = body[: place + 4] + struct.pack("<I", count) + body[place + 8 :]
            start = time.process_time()
            with contextlib.suppress(Rejected):
                check_bounds(probe(absurd), ImageConfig())
            assert time.process_time() - start < 0.5


def test_orientation_turns_the_size_that_bounds_see() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    header = probe(file_of(gradient(40, 64), "JPEG", exif=exif))
    assert (header.width, header.height, header.upright_size) == (64, 40, (40, 64))
    assert probe(png(16, 16, 0, 8, [bytes(16)] * 16)).upright_size == (16, 16)
