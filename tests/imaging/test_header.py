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
from tests.imaging.picture_files import bomb, chunk, file_of, gif, gradient, overwrite, png, reds


def rejection(data: bytes, **settings: object) -> Reason:
    with pytest.raises(Rejected) as rejected:
        check_bounds(probe(data), ImageConfig(**settings))  # type: ignore[arg-type]
    assert "\n" not in rejected.value.detail
    assert len(rejected.value.detail) < 300
    return rejected.value.reason


def webp_bomb(side: int = 16_383) -> bytes:
    return overwrite(file_of(reds([1])[0], "WEBP", lossless=True), 21, struct.pack("<I", side - 1 | (side - 1) << 14))


def tiff_bomb() -> bytes:
    body = file_of(reds([1], 50, 70)[0], "TIFF")
    for tag in (256, 257):
        body = overwrite(body, body.index(struct.pack("<HHI", tag, 4, 1)) + 8, struct.pack("<I", 1_000_000))
    return body


def jpeg_bomb() -> bytes:
    body = file_of(reds([1])[0], "JPEG")
    return overwrite(body, body.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_000, 65_000))


def jpeg2000_bomb() -> bytes:
    body = file_of(reds([1])[0], "JPEG2000")
    for marker, distance in ((b"\xff\x51", 6), (b"ihdr", 4)):
        body = overwrite(body, body.index(marker) + distance, struct.pack(">II", 30_000, 30_000))
    return body


@pytest.mark.parametrize(
    "make",
    [
        lambda: bomb(30_000, 30_000),  # past Pillow's own limit
        lambda: bomb(12_000, 12_000),  # past ours
        lambda: bomb(2**31 - 1, 2**31 - 1),
        jpeg_bomb,
        lambda: gif(65_535, 65_535, [(65_535, 65_535)]),
        webp_bomb,
        tiff_bomb,
        jpeg2000_bomb,
        lambda: overwrite(file_of(reds([1])[0], "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
        lambda: b"P6 40000 40000 255\n",
    ],
)
def test_a_decompression_bomb_costs_only_its_header(make: Callable[[], bytes]) -> None:
    data = make()
    rejection(data)
    start = time.process_time()
    for _ in range(10):
        assert rejection(data) is Reason.image_too_large
    assert (time.process_time() - start) / 10 < 0.05


def test_an_avif_bomb_is_rejected_by_its_decoder() -> None:
    body = file_of(reds([1])[0], "AVIF")
    avif_bomb = overwrite(body, body.index(b"ispe") + 8, struct.pack(">II", 30_000, 30_000))
    assert rejection(avif_bomb) in (Reason.image_too_large, Reason.image_truncated)


def test_images_outside_the_size_bounds_are_rejected() -> None:
    assert rejection(file_of(Image.new("RGB", (3, 3)))) is Reason.image_too_small
    assert rejection(file_of(Image.new("RGB", (300, 10))), min_side=8) is Reason.image_too_narrow
    assert rejection(file_of(Image.new("RGB", (30_000, 16)))) is Reason.image_too_narrow
    check_bounds(probe(file_of(Image.new("RGB", (30_000, 16)))), ImageConfig(max_aspect=2_000))
    assert rejection(file_of(gradient(100, 100)), max_pixels=9_999) is Reason.image_too_large
    check_bounds(probe(file_of(gradient(100, 100))), ImageConfig(max_pixels=10_000, max_aspect=1, min_side=100))


def test_images_that_need_too_much_decoder_memory_are_rejected() -> None:
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
def test_pixel_values_without_a_standard_range_are_rejected(image: Image.Image) -> None:
    assert rejection(file_of(image, "TIFF")) is Reason.image_unsupported


def test_files_that_are_not_images_differ_from_damaged_images() -> None:
    for data in (b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 100, b"BMW", b"P"):
        assert rejection(data) is Reason.image_not_an_image
    assert rejection(b"") is Reason.image_truncated
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF"):
        data = file_of(gradient(64, 64), format)
        assert rejection(data[:16]) is Reason.image_truncated, format


def test_huge_text_chunks_of_a_png_cost_nothing() -> None:
    picture = file_of(gradient(32, 48))
    huge = zlib.compress(bytes(50_000_000))
    for kind, body in {
        b"zTXt": b"Comment\0\0" + huge,
        b"iCCP": b"icc\0\0" + huge,
        b"iTXt": b"Comment\0\1\0\0\0" + huge,
        b"tEXt": b"Comment\0" + bytes(3_000_000),
    }.items():
        for position in (33, len(picture) - 12):  # after the header, before the end
            data = picture[:position] + chunk(kind, body) + picture[position:]
            start = time.process_time()
            header = probe(data)
            assert time.process_time() - start < 0.05
            assert np.array_equal(np.asarray(header.image.convert("RGB")), gradient(32, 48))
            assert without_notes(data) == picture
    assert without_notes(picture) is picture
    assert without_notes(picture[:50]) == picture[:50]
    assert without_notes(b"GIF89a") == b"GIF89a"


def test_absurd_tag_counts_of_a_tiff_cost_nothing() -> None:
    body = file_of(gradient(32, 48), "TIFF")
    directory = struct.unpack_from("<I", body, 4)[0]
    for position in range(directory + 2, len(body) - 12, 12):
        for count in (0, 2**31, 2**32 - 1):
            start = time.process_time()
            with contextlib.suppress(Rejected):
                check_bounds(probe(overwrite(body, position + 4, struct.pack("<I", count))), ImageConfig())
            assert time.process_time() - start < 0.5


def test_size_bounds_apply_to_the_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    header = probe(file_of(gradient(40, 64), "JPEG", exif=exif))
    assert (header.width, header.height, header.upright_size) == (64, 40, (40, 64))
    assert probe(png(16, 16, 0, 8, [bytes(16)] * 16)).upright_size == (16, 16)
