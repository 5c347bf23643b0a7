"""Pictures to views: seed, view number and key determine a view, and each setting only changes its own part."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from mmflow.core.errors import CorruptArtifactError
from mmflow.imaging.decode import Pixels
from mmflow.imaging.resample import PLAIN, resample
from mmflow.loading.config import AugmentConfig, CropConfig, Operation, PoliciesConfig
from mmflow.loading.transforms import (
    DRAWS,
    MAX_OPERATIONS,
    PAINTS,
    WARPS,
    Chosen,
    Recolour,
    View,
    centre_view,
    choose,
    choose_frames,
    draw_view,
    generator,
    paint,
    random_views,
    recolour,
    show,
    warp_of,
)
from tests.loading.pictures import encoded, noise, smooth

EACH: dict[str, Any] = {
    "crop": CropConfig(area=(0.2, 0.9), aspect=(0.6, 1.6)),
    "max_zoom": 1.5,
    "max_aspect": 1.3,
    "max_shift": 0.2,
    "max_rotation_degrees": 40,
    "flip": 0.5,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.5,
    "hue": 0.1,
    "policies": PoliciesConfig(count=3, operations=["colour", "equalise", "sharpness", "posterise"]),
}
ALL = AugmentConfig(**EACH)
sides = st.integers(8, 40)
lengths = st.integers(2, 130)  # of a picture's side: smaller than the view, and many times larger
seeds = st.integers(0, 2**32)


def random_view(body: bytes, side: int, augment: AugmentConfig, view: int, key: str = "key") -> Pixels:
    return random_views([body], "jpg", side, augment, generator(7, view, key))[0]


def drawn(width: int, height: int, augment: AugmentConfig, seed: int) -> View:
    return draw_view(width, height, augment, np.random.default_rng(seed).random(DRAWS).tolist())


def view(pixels: Pixels, side: int, augment: AugmentConfig, seed: int = 0) -> Pixels:
    """The view of decoded pixels."""
    height, width, _ = pixels.shape
    return show(pixels, side, drawn(width, height, augment, seed))


def numbers(view: View) -> Mapping[str, object]:
    """The part of a view that each setting decides."""
    warp = view.warp
    scale = math.hypot(warp.b, warp.e)
    return {
        "crop": view.part,
        "max_zoom": round(scale, 9),
        "max_aspect": round(math.hypot(warp.a, warp.d) / scale, 9),
        "max_shift": (warp.c, warp.f),
        "max_rotation_degrees": round(math.atan2(-warp.b, warp.e), 9),
        "flip": warp.a * warp.e - warp.b * warp.d < 0,
        **view.colours._asdict(),
        "policies": view.operations,
    }


# --- determinism ----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**63), number=st.integers(0, 2**40), key=st.text(max_size=30))
def test_a_seed_a_view_s_number_and_a_key_give_one_stream(seed: int, number: int, key: str) -> None:
    first = generator(seed, number, key).random(4).tolist()
    assert generator(seed, number, key).random(4).tolist() == first
    others = [(seed + 1, number, key), (seed, number + 1, key), (seed, number, key + "x")]
    for other in others:
        assert generator(*other).random(4).tolist() != first
    assert generator(seed, number, key, "text").random(4).tolist() != first


def test_streams_are_the_same_in_every_process_and_release() -> None:
    """Teachers' cached outputs are replayed by these numbers: changing them makes every cache wrong in silence."""
    program = 'from mmflow.loading.transforms import generator; print(generator(7, 3, "key-é").random(3).tolist())'
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(generator(7, 3, "key-é").random(3).tolist())
    assert generator(7, 3, "key-é").integers(0, 2**32, 3).tolist() == [2789366814, 3372933225, 4097970947]


def test_a_view_is_rebuilt_from_its_key_alone() -> None:
    bodies = {f"key-{number}": encoded(noise(90, 70, number), "JPEG") for number in range(12)}
    epoch = {key: random_view(body, 32, ALL, 2, key) for key, body in bodies.items()}
    for key in reversed(bodies):
        np.testing.assert_array_equal(random_view(bodies[key], 32, ALL, 2, key), epoch[key])
        assert not np.array_equal(random_view(bodies[key], 32, ALL, 3, key), epoch[key])


@pytest.mark.parametrize("name", EACH)
@given(seed=seeds, width=lengths, height=lengths)
def test_switching_one_setting_on_or_off_leaves_the_others_draws_as_they_were(
    name: str, seed: int, width: int, height: int
) -> None:
    everything = numbers(drawn(width, height, ALL, seed))
    without = AugmentConfig(**{other: value for other, value in EACH.items() if other != name})
    alone = AugmentConfig(**{name: EACH[name]})
    changed = numbers(drawn(width, height, without, seed))
    assert {key for key in everything if changed[key] != everything[key]} <= {name}
    assert numbers(drawn(width, height, alone, seed))[name] == everything[name]


def test_every_setting_changes_the_view() -> None:
    pixels = noise(60, 80)
    plain = centre_view(pixels, 32)
    for name, value in EACH.items():
        alone = AugmentConfig(**{name: value})
        changed = [not np.array_equal(view(pixels, 32, alone, seed), plain) for seed in range(20)]
        assert any(changed), name


@given(height=lengths, width=lengths, side=sides, seed=seeds)
def test_views_have_their_side_and_without_augmentation_are_the_centre_view(
    height: int, width: int, side: int, seed: int
) -> None:
    pixels = noise(height, width, seed)
    plain, augmented = centre_view(pixels, side), view(pixels, side, ALL, seed)
    for pixels_of_view in (plain, augmented):
        assert (pixels_of_view.shape, pixels_of_view.dtype) == ((side, side, 3), np.uint8)
    np.testing.assert_array_equal(view(pixels, side, AugmentConfig(), seed), plain)


def test_the_frames_of_a_clip_share_their_view() -> None:
    bodies = [encoded(smooth(64, 96), "WEBP", lossless=True)] * 3 + [encoded(noise(64, 96), "WEBP", lossless=True)]
    frames = random_views(bodies, "webp", 32, ALL, generator(0, 0, "clip"))
    assert np.array_equal(frames[0], frames[1])
    assert np.array_equal(frames[0], frames[2])
    (alone,) = random_views(bodies[3:], "webp", 32, ALL, generator(0, 0, "clip"))
    assert np.array_equal(frames[3], alone)


def test_bytes_that_are_no_picture_are_an_error() -> None:
    with pytest.raises(CorruptArtifactError, match="cannot be decoded"):
        random_view(b"nothing", 32, ALL, 0)


# --- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 56), (56, 32)])
def test_centre_view_is_the_middle_square_of_a_picture_that_is_not_square(height: int, width: int) -> None:
    pixels = noise(height, width)
    top, left = (height - 32) // 2, (width - 32) // 2
    np.testing.assert_array_equal(centre_view(pixels, 32), pixels[top : top + 32, left : left + 32])


@given(width=st.integers(20, 400), height=st.integers(20, 400), seed=seeds)
def test_crops_keep_to_their_area_and_aspect_and_lie_within_the_picture(width: int, height: int, seed: int) -> None:
    augment = AugmentConfig(crop=CropConfig(area=(0.3, 0.6), aspect=(0.5, 2)))
    left, top, share_x, share_y = drawn(width, height, augment, seed).part
    assert min(left, top) >= 0
    assert max(left + share_x, top + share_y) <= 1 + 1e-9
    assert 0.5 - 1e-9 <= share_x * width / (share_y * height) <= 2 + 1e-9
    if 0.5 <= width / height <= 2:
        assert 0.3 - 1e-9 <= share_x * share_y <= 0.6 + 1e-9


def test_crops_cover_the_whole_picture_and_all_areas() -> None:
    augment = AugmentConfig(crop=CropConfig(area=(0.1, 1.0)))
    parts = np.array([drawn(80, 72, augment, seed).part for seed in range(2000)])
    areas = parts[:, 2] * parts[:, 3]
    assert np.histogram(areas, 3, (0.1, 0.7))[0].min() > 350  # even but for shapes that do not fit
    assert parts[:, 0].min() < 0.01
    assert (parts[:, 0] + parts[:, 2]).max() > 0.99


def test_a_crop_that_cannot_fit_is_the_centre_at_the_nearest_aspect() -> None:
    augment = AugmentConfig(crop=CropConfig(area=(0.9, 1.0), aspect=(1.0, 1.0)))
    assert drawn(100, 20, augment, seed=0).part == pytest.approx((0.4, 0.0, 0.2, 1.0))


def test_a_crop_is_decoded_at_the_scale_that_it_needs() -> None:
    """The middle of a large picture, at its full resolution: its fine stripes are there."""
    pixels = np.repeat(np.tile(np.array([0, 255], np.uint8), 400).repeat(2)[None, :, None], 1600, axis=0)
    body = encoded(np.broadcast_to(pixels, (1600, 1600, 3)).copy(), "JPEG", quality=98, subsampling=0)
    small = AugmentConfig(crop=CropConfig(area=(0.0016, 0.0016), aspect=(1.0, 1.0)))  # 64 of the 1,600 pixels
    assert random_view(body, 64, small, 0).std() > 100
    assert random_view(body, 64, AugmentConfig(), 0).std() < 10


def test_flip_mirrors_left_and_right() -> None:
    for length in (32, 48):  # an even number of pixels each side of the middle
        mirrored = view(smooth(length, length), 32, AugmentConfig(flip=1)).astype(int)
        plain = centre_view(smooth(length, length), 32).astype(int)
        assert np.abs(mirrored - plain[:, ::-1]).max() <= 2
        assert np.abs(mirrored - plain).max() > 100


def test_zoomed_out_view_is_white_around_the_picture() -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    corners = np.array([view(black, 32, AugmentConfig(max_zoom=1.5), seed)[0, 0, 0] for seed in range(200)])
    assert set(corners.tolist()) == {0, 255}
    assert 60 < (corners == 255).sum() < 140  # as often enlarged as shrunk
    for seed in range(200):
        assert (view(black, 32, AugmentConfig(max_zoom=1.5), seed)[16, 16] == 0).all()


# --- colours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "grey", "lowest", "highest"), [("brightness", 100, 79, 120), ("contrast", 227, 206, 247)]
)
def test_brightness_and_contrast_use_their_range(setting: str, grey: int, lowest: int, highest: int) -> None:
    pixels, augment = np.full((16, 16, 3), grey, np.uint8), AugmentConfig.model_validate({setting: 0.2})
    levels = np.array([view(pixels, 16, augment, seed)[8, 8, 0] for seed in range(300)])
    assert lowest <= levels.min() < lowest + 5
    assert highest - 5 < levels.max() <= highest


def test_saturation_and_hue_keep_greys_and_luma() -> None:
    augment = AugmentConfig(saturation=0.4, hue=0.1)
    grey = np.full((16, 16, 3), 100, np.uint8)
    muted = np.broadcast_to(np.array([120, 100, 80], np.uint8), (16, 16, 3)).copy()
    seen = set()
    for seed in range(50):
        assert np.abs(view(grey, 16, augment, seed).astype(int) - 100).max() <= 1
        colour = view(muted, 16, augment, seed)[8, 8].astype(float)
        assert colour @ [0.213, 0.715, 0.072] == pytest.approx(muted[0, 0] @ [0.213, 0.715, 0.072], abs=1)
        seen.add(tuple(colour))
    assert len(seen) > 30


def test_hue_turns_red_towards_its_neighbours_and_saturation_spreads() -> None:
    red = np.broadcast_to(np.array([150, 90, 90], np.uint8), (2, 2, 3)).copy()
    third = recolour(red, Recolour(hue=1 / 3))[0, 0].astype(int)
    assert third.argmax() == 1  # green
    assert recolour(red, Recolour(hue=-1 / 3))[0, 0].argmax() == 2  # blue
    assert np.ptp(recolour(red, Recolour(saturation=0.0))[0, 0]) <= 1
    assert np.ptp(recolour(red, Recolour(saturation=1.5))[0, 0].astype(int)) == pytest.approx(90, abs=2)


@given(seed=seeds)
def test_table_and_matrix_agree(seed: int) -> None:
    pixels = noise(8, 8, seed)
    random = np.random.default_rng(seed)
    brightness, contrast = random.uniform(0.6, 1.4, 2)
    table = recolour(pixels, Recolour(brightness, contrast)).astype(int)
    matrix = recolour(pixels, Recolour(brightness, contrast, saturation=1 + 1e-9)).astype(int)
    assert np.abs(table - matrix).max() <= 1


# --- frames of clips --------------------------------------------------------------------------------------------------


@given(total=st.integers(1, 400), count=st.integers(1, 40), seed=st.none() | st.integers(0, 2**32))
def test_frames_ascend_and_come_one_from_each_span(total: int, count: int, seed: int | None) -> None:
    frames = choose_frames(total, count, None if seed is None else np.random.default_rng(seed))
    assert len(frames) == min(total, count)
    for number, frame in enumerate(frames):
        assert number * total // len(frames) <= frame < (number + 1) * total // len(frames)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(16, 4, [2, 6, 10, 14]), (10, 4, [1, 3, 6, 8]), (3, 8, [0, 1, 2]), (9, 1, [4]), (1, 4, [0])],
)
def test_evaluation_takes_the_middles(total: int, count: int, expected: list[int]) -> None:
    assert choose_frames(total, count) == expected


def test_training_draws_every_frame() -> None:
    random = np.random.default_rng(0)
    assert {frame for _ in range(300) for frame in choose_frames(20, 4, random)} == set(range(20))


def test_short_and_long_clips_draw_equally_many_numbers() -> None:
    after = []
    for total in (2, 100):
        random = np.random.default_rng(0)
        choose_frames(total, 8, random)
        after.append(random.random())
    assert after[0] == after[1]


# --- RandAugment ------------------------------------------------------------------------------------------------------


def test_every_operation_of_the_recipe_is_there() -> None:
    assert {"identity", *WARPS, *PAINTS} == set(get_args(Operation))


def test_operations_are_drawn_evenly_both_ways_and_as_many_as_asked() -> None:
    policies = PoliciesConfig(count=3, strength=0.4, operations=["rotate", "identity", "contrast", "equalise"])
    random = np.random.default_rng(0)
    counts = Counter(
        chosen for _ in range(4000) for chosen in choose(policies, random.random(2 * MAX_OPERATIONS).tolist())
    )
    assert sum(counts.values()) == 12_000
    assert len(counts) == 8
    assert {chosen.amount for chosen in counts} == {-0.4, 0.4}
    assert all(1300 < count < 1700 for count in counts.values())


def test_strength_zero_changes_nothing_unless_the_operation_has_no_strength() -> None:
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
    for painted in ways:
        assert (painted.shape, painted.dtype) == ((32, 32, 3), np.uint8)
        assert np.abs(painted.astype(int) - pixels.astype(int)).max() > 5
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


def test_folded_warps_equal_warps_in_turn() -> None:
    """Folded into one map they show what Pillow shows that applies them in turn, but for the second resampling."""
    pixels = np.asarray(Image.fromarray(noise(8, 8)).resize((96, 96), Image.Resampling.BICUBIC))
    chosen = [Chosen("rotate", 0.8), Chosen("translate_x", 0.4), Chosen("shear_y", -0.7)]
    box = (0, 0, 96, 96)
    at_once = resample(pixels, 96, box, warp_of(chosen)).astype(int)
    in_turn = pixels
    for operation in chosen:
        in_turn = resample(in_turn, 96, box, warp_of([operation]))
    inner = (slice(24, 72), slice(24, 72))
    assert np.abs(at_once - in_turn.astype(int))[inner].mean() < 4
    assert np.abs(at_once - pixels.astype(int))[inner].mean() > 20


def test_default_operations_keep_a_red_apple_red() -> None:
    """But for the two that stretch each channel by itself, as in the paper and in ALBEF."""
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, :] = (200, 40, 40)
    red[4:12, 4:12] = (150, 30, 30)
    for operation in set(PoliciesConfig().operations) - {"autocontrast", "equalise"}:
        for amount in (-0.5, 0.5):
            painted = paint(red, [Chosen(operation, amount)]).astype(int)
            assert (painted[:, :, 0] >= painted[:, :, 1]).all(), operation
            assert (painted[:, :, 1] == painted[:, :, 2]).all(), operation


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
def test_invalid_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentConfig.model_validate(settings)
