"""Corruptions are those of the published benchmarks, the same on every call, and stronger at each severity."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from mmflow.imaging.corruptions import CORRUPTIONS, Corruption, Severity, blank, corrupt
from mmflow.imaging.decode import Pixels
from tests.imaging.picture_files import opened
from tests.loading.pictures import encoded, noise, smooth

SEVERITIES = get_args(Severity)
names = pytest.mark.parametrize("name", CORRUPTIONS)
sides = pytest.mark.parametrize("side", [32, 64, 100, 224, 256])


def detailed(side: int) -> Pixels:
    """A coloured slope with fine detail, away from black and white."""
    return (smooth(side, side) // 2 + noise(side, side) // 8 + 40).astype(np.uint8)


def edge(side: int) -> Pixels:
    """Black on the left, white on the right."""
    return np.repeat(
        np.where(np.arange(side) < side // 2, 0, 255).astype(np.uint8)[None, :, None], side, axis=0
    ).repeat(3, axis=2)


def distance(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def test_the_settings_name_every_corruption() -> None:
    assert set(get_args(Corruption)) == set(CORRUPTIONS)


@names
@sides
def test_a_higher_severity_changes_more(name: Corruption, side: int) -> None:
    view = detailed(side)
    before = view.copy()
    corrupted = [corrupt(view, name, severity, "key") for severity in SEVERITIES]
    assert {(pixels.shape, pixels.dtype) for pixels in corrupted} == {(view.shape, view.dtype)}
    distances = [distance(pixels, view) for pixels in corrupted]
    assert distances == sorted(distances)
    assert distances[0] > 0.5
    np.testing.assert_array_equal(view, before)


@names
def test_the_key_alone_decides_the_draws(name: Corruption) -> None:
    view = detailed(64)
    first, again, other = (corrupt(view, name, 3, key) for key in ("00017", "00017", "00018"))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (name not in ("noise", "crop"))


@pytest.mark.parametrize(
    ("side", "severity", "deviation"), [(32, 1, 0.04), (32, 5, 0.1), (64, 5, 0.18), (224, 3, 0.18)]
)
def test_noise_is_that_of_the_published_sets(side: int, severity: Severity, deviation: float) -> None:
    grey = np.full((side, side, 3), 128, np.uint8)
    error = corrupt(grey, "noise", severity, "key").astype(float) - 128
    assert error.mean() == pytest.approx(0, abs=255 * deviation / 15)
    assert error.std() == pytest.approx(255 * deviation, rel=0.05)


@pytest.mark.parametrize(
    ("side", "severity", "deviation"),
    [(32, 1, 0.4), (32, 5, 1.0), (64, 5, 1.5), (224, 1, 1), (224, 5, 6), (448, 5, 12)],
)
def test_blur_is_that_of_the_published_sets(side: int, severity: Severity, deviation: float) -> None:
    """The spread of a blurred edge is the Gaussian's."""
    slope = np.diff(corrupt(edge(side), "blur", severity, "key")[side // 2, :, 0].astype(float)) / 255
    places = np.arange(len(slope))
    assert np.sqrt((slope * (places - (slope * places).sum()) ** 2).sum()) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(("side", "severity", "quality"), [(32, 1, 80), (64, 3, 50), (224, 1, 25), (224, 5, 7)])
def test_jpeg_is_that_of_the_published_sets(side: int, severity: Severity, quality: int) -> None:
    view = detailed(side)
    body = encoded(view, "JPEG", quality=quality)
    np.testing.assert_array_equal(corrupt(view, "jpeg", severity, "key"), opened(body))


def test_strengths_between_published_sides_are_between_theirs() -> None:
    errors = [corrupt(np.full((side, side, 3), 128, np.uint8), "noise", 3, "key").std() for side in (64, 120, 224)]
    assert errors == sorted(errors)
    assert errors[1] == pytest.approx((errors[0] + errors[2]) / 2, rel=0.05)  # 120 is their geometric mean


def test_a_crop_shows_a_part_of_the_same_place() -> None:
    """Colours of a slope tell where a part lies and how much of it is there."""
    ranges = [
        (int(part.min()), int(part.max()))
        for part in (corrupt(smooth(200, 200), "crop", severity, "key")[..., 0] for severity in SEVERITIES)
    ]
    for outer, inner in pairwise(ranges):
        assert outer[0] <= inner[0] < inner[1] <= outer[1]
    lefts = {int(corrupt(smooth(200, 200), "crop", 5, str(key))[..., 0].min()) for key in range(50)}
    assert max(lefts) - min(lefts) > 60
    first, last = ranges[-1]
    assert last - first == pytest.approx(80, abs=3)  # half of the slope from 40 to 200


def test_grey_takes_the_colour_and_leaves_the_light() -> None:
    view = detailed(64)
    grey = corrupt(view, "grey", 5, "key")
    assert (grey == grey[..., :1]).all()
    luma = np.asarray(Image.fromarray(view).convert("L")).astype(int)
    assert np.abs(grey[..., 0] - luma).max() <= 1


def test_a_blank_view_says_nothing() -> None:
    assert np.unique(blank(detailed(32))).tolist() == [128]
    assert blank(detailed(32)).shape == (32, 32, 3)
