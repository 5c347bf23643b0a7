"""The resampling filter of all views: antialiased, equally sharp for rotated and straight views, without a shift."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmflow.imaging.decode import Pixels
from mmflow.imaging.resample import LEVEL, MIRRORED, Affine, Box, resample
from tests.loading.pictures import checkerboard, noise, smooth

SIDE = 64
ALMOST_PLAIN = Affine(a=1 + 1e-9)  # takes the code path of warped views
lengths = st.integers(16, 150)


def rotated(degrees: float) -> Affine:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return Affine(cosine, -sine, 0.0, sine, cosine, 0.0)


def whole(pixels: Pixels) -> Box:
    return (0, 0, pixels.shape[1], pixels.shape[0])


def contrast(pixels: Pixels) -> float:
    return float(pixels.astype(float).std())


@pytest.mark.parametrize("warp", [Affine(), rotated(20), Affine(a=0.9, e=0.9, c=0.03), rotated(45)])
@pytest.mark.parametrize("length", [128, 147, 191, 200, 330, 777])
def test_a_fine_checkerboard_becomes_grey(length: int, warp: Affine) -> None:
    view = resample(checkerboard(length, length), SIDE, (0, 0, length, length), warp)
    inner = view[16:48, 16:48].astype(float)
    assert np.abs(inner - 127.5).max() < 15


def test_a_coarse_checkerboard_keeps_its_contrast() -> None:
    coarse = checkerboard(6 * SIDE, 6 * SIDE, cell=24)
    assert contrast(resample(coarse, SIDE, whole(coarse))) > 100


@pytest.mark.parametrize("ratio", [1.5, 1.9, 2.5, 4, 7.3])
@pytest.mark.parametrize(("degrees", "tolerance"), [(0.001, 0.12), (3, 0.12), (17, 0.12), (45, 0.25), (90, 0.12)])
def test_a_rotated_view_is_as_sharp_as_a_straight_one(ratio: float, degrees: float, tolerance: float) -> None:
    length = round(ratio * SIDE)
    pixels = noise(2 * length, 2 * length)
    box = (length // 2, length // 2, length // 2 + length, length // 2 + length)
    straight = contrast(resample(pixels, SIDE, box))
    assert contrast(resample(pixels, SIDE, box, rotated(degrees))) == pytest.approx(straight, rel=tolerance)


def test_the_filter_blurs_as_much_as_pillows_bilinear_filter() -> None:
    for ratio in (1.9, 2.5, 4, 7.3):
        length = round(ratio * SIDE)
        pixels = noise(length, length)
        pillow = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        assert contrast(resample(pixels, SIDE, whole(pixels))) == pytest.approx(contrast(pillow), rel=0.05)


@given(height=lengths, width=lengths, side=st.integers(8, 40), data=st.data())
def test_straight_and_warped_views_use_the_same_filter(height: int, width: int, side: int, data: st.DataObject) -> None:
    """Equal within rounding where nothing is shrunk first, else equal in the mean."""
    left, top = data.draw(st.integers(0, width - 8)), data.draw(st.integers(0, height - 8))
    box = (left, top, data.draw(st.integers(left + 8, width)), data.draw(st.integers(top + 8, height)))
    pixels = smooth(height, width)
    straight = resample(pixels, side, box).astype(int)
    warped = resample(pixels, side, box, ALMOST_PLAIN).astype(int)
    assert straight.shape == warped.shape == (side, side, 3)
    error = np.abs(straight - warped)
    if max(box[2] - box[0], box[3] - box[1]) <= LEVEL * side and box == (0, 0, width, height):
        assert error.max() <= 2
    assert error.mean() < 4


def test_a_view_of_the_same_size_is_the_picture() -> None:
    pixels = noise(32, 32)
    np.testing.assert_array_equal(resample(pixels, 32, (0, 0, 32, 32)), pixels)
    np.testing.assert_array_equal(resample(pixels, 32, (0, 0, 32, 32), MIRRORED), pixels[:, ::-1])


@pytest.mark.parametrize("length", [20, 50, 64, 100, 200])
@pytest.mark.parametrize("warp", [Affine(), ALMOST_PLAIN])
def test_nothing_is_shifted(length: int, warp: Affine) -> None:
    """Enlarged, shrunk a little and shrunk first: a smooth picture stays the same smooth picture."""
    view = resample(smooth(length, length), 32, (0, 0, length, length), warp)
    error = np.abs(view.astype(int) - smooth(32, 32).astype(int))
    assert error.mean() < 5
    assert error[4:-4, 4:-4].max() < 9  # a shift by one pixel would be an error of 5


@pytest.mark.parametrize("length", [48, 100, 400])
def test_a_warp_moves_and_rotates_the_view(length: int) -> None:
    pixels = smooth(length, length).astype(np.uint8)
    box = (length // 4, length // 4, length - length // 4, length - length // 4)
    right = resample(pixels, 32, box, Affine(c=0.25)).astype(int)
    plain = resample(pixels, 32, box).astype(int)
    assert np.abs(right[:, :-8] - plain[:, 8:]).max() <= 5  # a quarter of the view's 32 pixels
    quarter = resample(pixels, 32, box, rotated(90)).astype(int)
    assert np.abs(quarter[::-1].transpose(1, 0, 2)[4:-4, 4:-4] - plain[4:-4, 4:-4]).max() <= 8


@pytest.mark.parametrize("length", [3, 17, 24, 32, 90, 300])
def test_only_outside_the_picture_is_white(length: int) -> None:
    black = np.zeros((length, length, 3), np.uint8)
    assert (resample(black, 32, whole(black)) == 0).all()
    view = resample(black, 32, whole(black), Affine(a=1.5, e=1.5))
    assert (view[0] == 255).all()
    assert (view[16, 16] == 0).all()
    assert (resample(black, 32, whole(black), Affine(c=5.0)) == 255).all()


def test_thin_lines_survive_shrinking() -> None:
    for column in range(128):
        pixels = np.full((128, 128, 3), 255, np.uint8)
        pixels[:, column] = 0
        assert resample(pixels, 32, whole(pixels))[16].min() < 225, column


@given(width=lengths, height=lengths)
def test_composed_maps_equal_one_map_after_the_other(width: int, height: int) -> None:
    first, second = Affine(1.1, 0.2, 0.3, -0.1, 0.9, 0.05), Affine(0.7, -0.4, 0.1, 0.2, 1.3, -0.2)
    x, y = width / 150, height / 150

    def at(warp: Affine, x: float, y: float) -> tuple[float, float]:
        return warp.a * x + warp.b * y + warp.c, warp.d * x + warp.e * y + warp.f

    assert at(first.of(second), x, y) == pytest.approx(at(first, *at(second, x, y)))
