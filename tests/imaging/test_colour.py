"""Colours: in every mode, pixels are what a viewer shows on the background."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmflow.imaging import decode as colour
from mmflow.imaging.decode import decode_source, flatten, solid
from mmflow.imaging.header import probe
from tests.imaging.picture_files import chunk, file_of, gradient, png, tiff, ycck

RAMP = gradient(64, 64)


def rgb(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    return flatten(decode_source(data, probe(data), 4096, background), background).astype(np.int64)


def test_transparent_pixels_show_the_background() -> None:
    alpha = Image.fromarray(gradient(32, 32)).convert("RGBA")
    alpha.putalpha(0)
    assert (rgb(file_of(alpha)) == 255).all()
    assert (rgb(file_of(alpha), (9, 8, 7)) == [9, 8, 7]).all()
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    assert (rgb(file_of(palette)) == [200, 30, 30]).all()
    assert (rgb(file_of(palette, transparency=1)) == 255).all()
    assert np.abs(rgb(file_of(palette, transparency=b"\xff\x80")) - [227, 142, 142]).max() <= 1
    grey = Image.merge("LA", [Image.new("L", (32, 32), 0), Image.new("L", (32, 32), 128)])
    assert np.abs(rgb(file_of(grey)) - 127).max() <= 1
    assert np.abs(rgb(file_of(grey), (0, 100, 0)) - [0, 50, 0]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_common_modes_match_pillow(mode: str) -> None:
    expected = np.asarray(Image.fromarray(RAMP).convert(mode).convert("RGB")).astype(int)
    assert np.array_equal(rgb(file_of(Image.fromarray(RAMP).convert(mode))), expected)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    deep = Image.fromarray((RAMP[..., 0].astype(np.uint16) << 8) + 77)
    for format in ("PNG", "TIFF", "JPEG2000"):
        assert np.abs(rgb(file_of(deep, format)) - RAMP[..., :1]).max() <= 1
    assert np.array_equal(rgb(b"P5 2 1 65535\n\x80\x00\xff\xff"), [[[128] * 3, [255] * 3]])
    assert np.array_equal(rgb(b"P5 2 1 1023\n\x02\x00\x03\xff"), [[[128] * 3, [255] * 3]])
    white_is_zero = tiff(16, 16, 16, 0, np.full((16, 16), 0xF000, "<u2").tobytes())
    assert (rgb(white_is_zero) == 0x0F).all()
    assert (rgb(tiff(16, 16, 12, 1, b"\xff\xff\xff" * 128)) == 255).all()
    row = np.array([0, 1000, 40_000, 65_535], ">u2").tobytes()
    translucent = png(4, 1, 0, 16, [row], chunk(b"tRNS", (40_000).to_bytes(2, "big")))
    assert rgb(translucent, (1, 2, 3)).tolist() == [[[0] * 3, [3] * 3, [1, 2, 3], [255] * 3]]


def test_16_bit_colours_are_scaled_and_not_clipped() -> None:
    rows = [(row.astype(">u2") * 257).tobytes() for row in RAMP]
    assert np.array_equal(rgb(png(64, 64, 2, 16, rows)), RAMP)
    opaque = np.dstack([RAMP, np.full((64, 64), 255, np.uint8)])
    assert np.array_equal(rgb(png(64, 64, 6, 16, [(row.astype(">u2") * 257).tobytes() for row in opaque])), RAMP)
    red, grey = np.array([[60_000, 0, 0], [33_000, 33_000, 33_000]], ">u2")
    translucent = png(2, 1, 2, 16, [red.tobytes() + grey.tobytes()], chunk(b"tRNS", grey.tobytes()))
    assert rgb(translucent, (1, 2, 3)).tolist() == [[[234, 0, 0], [1, 2, 3]]]


def test_cmyk_and_ycck_jpegs_are_not_inverted() -> None:
    for data in (file_of(Image.fromarray(RAMP).convert("CMYK"), "JPEG", quality=95), ycck(RAMP)):
        assert probe(data).mode == "CMYK"
        assert np.abs(rgb(data) - RAMP).mean() < 2
    assert np.abs(rgb(file_of(Image.fromarray(RAMP).convert("CMYK"), "TIFF")) - RAMP).max() == 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("factor", [1, 3])
def test_decoding_in_strips_changes_nothing(mode: str, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (101, 67, 4), dtype=np.uint8), "RGBA")
    image = (
        Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)
    )
    if mode == "P":
        image.info["transparency"] = bytes(range(0, 256, 2))
    whole = solid(image, (10, 200, 30), factor)
    monkeypatch.setattr(colour, "STRIP_PIXELS", 67 * 10)
    assert np.array_equal(solid(image, (10, 200, 30), factor), whole)
    assert whole.size == (-(-67 // factor), -(-101 // factor))


def test_hidden_colours_do_not_bleed_when_shrunk() -> None:
    pixels = np.zeros((90, 90, 4), np.uint8)
    pixels[..., 0] = 255  # hidden red
    pixels[::2, ::2] = (0, 0, 255, 255)
    shrunk = flatten(solid(Image.fromarray(pixels), (0, 255, 0), 6), (0, 255, 0))
    assert np.abs(shrunk.astype(int) - [0, 191, 64]).max() <= 1


MEASURE = """
import sys
from pathlib import Path
from mmflow.cleaning.config import ImageConfig
from mmflow.cleaning.images import prepare_images
prepare_images([Path(sys.argv[1]).read_bytes()], ImageConfig(max_pixels=90_000_000))
# Not getrusage, which includes the parent's memory before exec.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_the_largest_palette_stays_within_a_workers_memory(tmp_path: Path) -> None:
    side = 9_400
    row = (np.arange(side) * 16 // side).astype(np.uint8).tobytes()
    notes = chunk(b"PLTE", bytes(range(48))), chunk(b"tRNS", bytes([0, 128] + [255] * 14))
    path = tmp_path / "palette.png"
    path.write_bytes(png(side, side, 3, 8, [row] * side, *notes))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    # The whole as RGBA would need 354 MB; the interpreter and its libraries need about 50.
    assert int(run.stdout) < 300_000  # KiB
