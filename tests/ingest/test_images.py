"""Images: every mode to upright RGB over white, bombs refused by their headers, damage named."""

import io
import struct
import time
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from mmflow.ingest.images import TURNS, decode, encode, prepare_image, probe, resize
from mmflow.ingest.reasons import Reason, Rejected

DEFAULTS = {"side": 64, "max_pixels": 1_000_000, "min_side": 8, "max_aspect": 4.0, "format": "jpeg", "quality": 90}


def gradient(height: int, width: int) -> npt.NDArray[np.uint8]:
    """(height, width, 3): smooth, and different at every corner."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def file_of(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, format, **options)  # type: ignore[arg-type]
    return target.getvalue()


def rgb(data: bytes, side: int = 4096) -> npt.NDArray[np.int64]:
    return decode(data, probe(data), side).astype(np.int64)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels, in a hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def rejection(data: bytes, **changes: object) -> Reason:
    with pytest.raises(Rejected) as rejected:
        prepare_image(data, **{**DEFAULTS, **changes})  # type: ignore[arg-type]
    assert "\n" not in rejected.value.detail
    return rejected.value.reason


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_orientation_is_applied_as_pillow_does(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(
        Image.fromarray(gradient(40, 64)), format, exif=exif, **({"quality": 95} if format == "JPEG" else {})
    )
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.abs(rgb(data) - np.asarray(expected)).max() <= 3


def test_transparency_is_white_and_not_whatever_lay_beneath() -> None:
    alpha = Image.fromarray(gradient(32, 32)).convert("RGBA")
    alpha.putalpha(0)
    assert (rgb(file_of(alpha)) == 255).all()
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    assert (rgb(file_of(palette)) == [200, 30, 30]).all()
    assert (rgb(file_of(palette, transparency=1)) == 255).all()
    grey = Image.merge("LA", [Image.new("L", (32, 32), 0), Image.new("L", (32, 32), 128)])
    assert np.abs(rgb(file_of(grey)) - 127).max() <= 1


def test_every_mode_keeps_its_picture() -> None:
    ramp = gradient(64, 64)
    deep = Image.fromarray((ramp[..., 0].astype(np.uint16) << 8) + 77)
    assert np.abs(rgb(file_of(deep)) - ramp[..., :1]).max() <= 1
    assert np.abs(rgb(file_of(Image.fromarray(ramp).convert("L"))).std(axis=-1)).max() == 0
    cmyk = rgb(file_of(Image.fromarray(ramp).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk - ramp).mean() < 4
    bits = Image.fromarray(ramp[..., 0]).convert("1")
    assert set(np.unique(rgb(file_of(bits)))) == {0, 255}
    assert rejection(file_of(Image.fromarray(ramp[..., 0].astype(np.float32)), "TIFF")) is Reason.image_unsupported


def test_resizing_keeps_the_picture_and_never_enlarges() -> None:
    large = gradient(600, 900)
    for data in (file_of(Image.fromarray(large), "JPEG", quality=95), file_of(Image.fromarray(large))):
        small = resize(decode(data, probe(data), 64), 64)
        assert small.shape == (64, 96, 3)
        assert np.abs(small.astype(int) - gradient(64, 96)).mean() < 4
    assert resize(large[:30, :40], 64).shape == (30, 40, 3)
    assert resize(large[:100, :201], 64).shape == (64, 129, 3)


def test_jpeg_is_reduced_while_it_decodes() -> None:
    data = file_of(Image.fromarray(gradient(1024, 1536)), "JPEG")
    assert decode(data, probe(data), 120).shape == (128, 192, 3)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_encoding_is_faithful_and_repeatable(format: str) -> None:
    image = gradient(48, 64)
    data = encode(image, format, 90)
    assert data == encode(image, format, 90)
    assert np.abs(rgb(data) - image).mean() < 3


def test_bomb_costs_its_header_only() -> None:
    start = time.perf_counter()
    assert rejection(bomb(30_000, 30_000)) is Reason.image_too_large  # past Pillow's own limit
    assert rejection(bomb(9_000, 9_000)) is Reason.image_too_large  # past ours
    assert time.perf_counter() - start < 1


def test_bounds() -> None:
    assert rejection(file_of(Image.new("RGB", (3, 3)))) is Reason.image_too_small
    assert rejection(file_of(Image.new("RGB", (300, 10)))) is Reason.image_too_narrow
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    assert rejection(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])) is Reason.image_animated


def test_damage_is_named() -> None:
    noise = Image.effect_noise((128, 128), 80).convert("RGB")
    assert rejection(b"") is Reason.image_truncated
    assert rejection(b"<html>404</html>") is Reason.image_not_an_image
    assert rejection(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") is Reason.image_not_an_image
    for format in ("PNG", "JPEG", "WEBP", "GIF"):
        data = file_of(noise, format)
        for share in (0.5, 0.9):
            assert rejection(data[: int(len(data) * share)]) is Reason.image_truncated, (format, share)


def test_harmless_stray_bytes_cost_no_image() -> None:
    jpeg = file_of(Image.fromarray(gradient(64, 64)), "JPEG", quality=95)
    tables = jpeg.index(b"\xff\xdb")
    for sloppy in (jpeg + b"trailing", jpeg[:tables] + bytes(2) + jpeg[tables:]):
        assert np.abs(rgb(sloppy) - rgb(jpeg)).max() <= 1
        prepared = prepare_image(sloppy, **DEFAULTS)  # type: ignore[arg-type]
        assert (prepared.width, prepared.height, prepared.extension) == (64, 64, "jpg")
