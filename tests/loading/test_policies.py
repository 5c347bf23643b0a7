"""RandAugment's operations: drawn evenly, each within its range, and those that move pixels folded into one map."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mmflow.imaging.resample import PLAIN, resample
from mmflow.loading.config import AugmentConfig, Operation, PoliciesConfig
from mmflow.loading.transforms import MAX_OPERATIONS, PAINTS, WARPS, Chosen, choose, paint, warp_of
from tests.loading.pictures import noise


def test_every_operation_of_the_recipe_is_there() -> None:
    assert {"identity", *WARPS, *PAINTS} == set(get_args(Operation))


def test_operations_are_drawn_evenly_both_ways_and_as_many_as_asked() -> None:
    policies = PoliciesConfig(count=3, strength=0.4, operations=["rotate", "identity", "contrast", "equalise"])
    random = np.random.default_rng(0)
    found = Counter(
        chosen for _ in range(4000) for chosen in choose(policies, random.random(2 * MAX_OPERATIONS).tolist())
    )
    assert sum(found.values()) == 12_000
    assert len(found) == 8
    assert {chosen.amount for chosen in found} == {-0.4, 0.4}
    assert all(1300 < count < 1700 for count in found.values())


def test_no_strength_changes_nothing_but_what_has_none() -> None:
    pixels = noise(32, 32)
    for operation in get_args(Operation):
        chosen = [Chosen(operation, 0.0)]
        assert warp_of(chosen) == PLAIN, operation
        if operation not in ("autocontrast", "equalise", "solarise"):
            np.testing.assert_array_equal(paint(pixels, chosen), pixels)
    solarised = paint(pixels, [Chosen("solarise", 0.0)])
    np.testing.assert_array_equal(solarised[pixels < 255], pixels[pixels < 255])


@pytest.mark.parametrize("operation", sorted(PAINTS))
def test_full_strength_changes_values_and_the_input_stays(operation: str) -> None:
    pixels = noise(32, 32) // 2 + 40
    before = pixels.copy()
    ways = [paint(pixels, [Chosen(operation, amount)]) for amount in (-1.0, 1.0)]
    for found in ways:
        assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
        assert np.abs(found.astype(int) - pixels.astype(int)).max() > 5
    np.testing.assert_array_equal(pixels, before)


def test_ranges_are_those_of_the_paper() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    assert paint(grey, [Chosen("brightness", 1.0)])[0, 0, 0] == 190
    assert paint(grey, [Chosen("brightness", -1.0)])[0, 0, 0] == 10
    assert paint(grey, [Chosen("posterise", 1.0)])[0, 0, 0] == 96  # four bits of eight
    assert paint(grey, [Chosen("solarise", 1.0)])[0, 0, 0] == 155
    assert warp_of([Chosen("shear_x", 1.0)]).b == 0.3
    assert warp_of([Chosen("translate_y", -0.5)]).f == -75 / 331
    assert warp_of([Chosen("rotate", 1.0)]).d == pytest.approx(0.5)  # the sine of 30 degrees


def test_two_warps_are_one_after_the_other() -> None:
    """Folded into one map they show what Pillow shows that applies them in turn, but for the second resampling."""
    pixels = np.asarray(Image.fromarray(noise(8, 8)).resize((96, 96), Image.Resampling.BICUBIC))
    chosen = [Chosen("rotate", 0.8), Chosen("translate_x", 0.4), Chosen("shear_y", -0.7)]
    box = (0, 0, 96, 96)
    found = resample(pixels, 96, box, warp_of(chosen)).astype(int)
    in_turn = pixels
    for each in chosen:
        in_turn = resample(in_turn, 96, box, warp_of([each]))
    inner = (slice(24, 72), slice(24, 72))
    assert np.abs(found - in_turn.astype(int))[inner].mean() < 4
    assert np.abs(found - pixels.astype(int))[inner].mean() > 20


def test_default_operations_keep_a_red_apple_red() -> None:
    """But for the two that stretch each channel by itself, as in the paper and in ALBEF."""
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, :] = (200, 40, 40)
    red[4:12, 4:12] = (150, 30, 30)
    for operation in set(PoliciesConfig().operations) - {"autocontrast", "equalise"}:
        for amount in (-0.5, 0.5):
            found = paint(red, [Chosen(operation, amount)]).astype(int)
            assert (found[:, :, 0] >= found[:, :, 1]).all(), operation
            assert (found[:, :, 1] == found[:, :, 2]).all(), operation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": {"operations": ["rotat"]}}, "rotate"),
        ({"policies": {"count": 9}}, "less than or equal to 8"),
        ({"crop": {"area": [0.9, 0.5]}}, r"area \[0.9, 0.5\] is not a range within \(0, 1\]"),
        ({"crop": {"area": [0, 0.5]}}, "is not a range"),
        ({"crop": {"aspect": [2, 1]}}, r"aspect \[2.0, 1.0\] is not a range above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentConfig.model_validate(settings)
