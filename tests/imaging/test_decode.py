"""Stored pictures to pixels: every format upright and in RGB, a JPEG at the requested scale or above."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmflow.core.errors import CorruptArtifactError
from mmflow.imaging.decode import decode, open_picture, read_pixels
from tests.imaging.picture_files import file_of
from tests.loading.pictures import checkerboard, encoded, noise, smooth

LARGE = encoded(smooth(512, 768), "JPEG")


def test_a_jpeg_is_shrunk_while_decoding_but_not_below_the_needed_side() -> None:
    for side, max_height in ((64, 64), (65, 128), (200, 256), (512, 512), (2000, 512)):
        pixels = decode(LARGE, "jpg", side)
        height, width, _ = pixels.shape
        assert min(side, 512) <= height <= max_height
        assert width == height * 3 // 2
        assert np.abs(pixels.astype(int) - smooth(height, width).astype(int)).mean() < 4


@given(
    side=st.integers(8, 600),
    share=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    size=st.tuples(st.integers(16, 700), st.integers(16, 700)),
)
def test_a_part_of_a_jpeg_keeps_enough_pixels(side: int, share: tuple[float, float], size: tuple[int, int]) -> None:
    width, height = size
    picture = open_picture(encoded(smooth(height, width), "JPEG"), "jpg")
    pixels = read_pixels(picture, side, share)
    assert (picture.width, picture.height) == size
    for length, whole, part in ((pixels.shape[1], width, share[0]), (pixels.shape[0], height, share[1])):
        assert length == whole or length * part >= side - 1e-6


def test_a_small_part_of_a_jpeg_is_decoded_at_a_larger_scale() -> None:
    picture = open_picture(LARGE, "jpg")
    assert read_pixels(picture, 64).shape[:2] == (64, 96)
    assert read_pixels(picture, 64, (0.5, 0.5)).shape[:2] == (128, 192)
    assert read_pixels(picture, 64, (0.5, 1.0)).shape[:2] == (128, 192)
    assert read_pixels(picture, 64, (0.1, 0.1)).shape[:2] == (512, 768)


def test_details_finer_than_the_scale_become_grey() -> None:
    pixels = decode(encoded(checkerboard(512, 512), "JPEG", quality=100, subsampling=0), "jpg", 64)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels.astype(int) - 127).max() <= 3


@pytest.mark.parametrize(("format", "extension"), [("PNG", "png"), ("WEBP", "webp"), ("JPEG", "jpeg")])
def test_every_stored_format_is_decoded_to_rgb(format: str, extension: str) -> None:
    pixels = decode(encoded(smooth(40, 60), format), extension, 40)
    assert (pixels.shape, pixels.dtype) == ((40, 60, 3), np.uint8)
    assert np.abs(pixels.astype(int) - smooth(40, 60).astype(int)).mean() < 4


@pytest.mark.parametrize(("mode", "format"), [("P", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("I;16", "PNG")])
def test_other_modes_become_rgb(mode: str, format: str) -> None:
    grey = Image.fromarray(smooth(24, 24)).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) << 8) if mode == "I;16" else grey.convert(mode)
    pixels = decode(file_of(image, format), format.lower(), 24)
    expected = np.asarray(grey).astype(int)[:, :, None]
    assert pixels.shape == (24, 24, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < 5


def test_transparent_parts_are_white() -> None:
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, 4:, 3] = 255
    pixels = decode(encoded(clear, "PNG"), "png", 8)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    """Adopted tars may hold a camera's files. EXIF says where the first stored row and column belong."""
    upright = smooth(32, 64)
    first_row, first_column = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    stored = upright if first_row in ("top", "bottom") else upright.transpose(1, 0, 2)
    stored = stored[::-1] if first_row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if first_column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encoded(np.ascontiguousarray(stored), format, exif=exif.tobytes())
    picture = open_picture(body, format.lower())
    assert (picture.width, picture.height) == (64, 32)
    pixels = read_pixels(picture, 16, (1.0, 0.5))  # half of its height needs 16 pixels: all of its 32
    assert np.abs(pixels.astype(int) - upright.astype(int)).mean() < 4


def test_a_jpeg_with_stray_bytes_is_read() -> None:
    body = encoded(smooth(40, 40), "JPEG")
    marker = body.index(b"\xff\xda")
    assert decode(body[:marker] + b"\0\0\0" + body[marker:], "jpg", 40).shape == (40, 40, 3)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kept", [0, 10, 0.5])
def test_a_damaged_picture_is_an_error(extension: str, kept: float) -> None:
    body = encoded(noise(40, 40), {"jpg": "JPEG"}.get(extension, extension.upper()))
    cut = body[: int(len(body) * kept) if kept < 1 else int(kept)]
    with pytest.raises(CorruptArtifactError, match=rf"\.{extension} of {len(cut)} bytes.*; set"):
        decode(cut, extension, 20)
