"""Pictures to views: the plain view is the random one with nothing switched on, and a seed gives one view."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmflow.loading.config import AugmentConfig
from mmflow.loading.transforms import Pixels, centre_view, decode, drop_tokens, random_view

STRONG = AugmentConfig(
    max_zoom=1.5, max_aspect=1.3, max_shift=0.2, max_rotation_degrees=40, flip=0.5, brightness=0.3, contrast=0.3
)
sides = st.integers(8, 40)
lengths = st.integers(2, 130)  # of a picture's side: smaller than the view, and many times larger


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Red grows to the right, green downwards."""
    red = np.broadcast_to(np.linspace(40, 200, width)[None, :], (height, width))
    green = np.broadcast_to(np.linspace(40, 200, height)[:, None], (height, width))
    return np.stack([red, green, np.full((height, width), 90.0)], axis=-1).astype(np.uint8)


def view(pixels: Pixels, side: int, augment: AugmentConfig, seed: int = 0) -> Pixels:
    return random_view(pixels, side, augment, np.random.default_rng(seed))


def encoded(pixels: Pixels, format: str) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format, quality=95)
    return target.getvalue()


@given(height=lengths, width=lengths, side=sides, seed=st.integers(0, 2**32))
def test_nothing_switched_on_is_the_centre_view(height: int, width: int, side: int, seed: int) -> None:
    pixels = picture(height, width, seed)
    plain = centre_view(pixels, side)
    assert plain.shape == (side, side, 3)
    assert plain.dtype == np.uint8
    np.testing.assert_array_equal(view(pixels, side, AugmentConfig(), seed), plain)


@given(height=lengths, width=lengths, side=sides, seed=st.integers(0, 2**32))
def test_a_seed_gives_one_view_of_any_picture(height: int, width: int, side: int, seed: int) -> None:
    pixels = picture(height, width)
    first = view(pixels, side, STRONG, seed)
    assert first.shape == (side, side, 3)
    np.testing.assert_array_equal(view(pixels, side, STRONG, seed), first)


def test_seeds_give_different_views() -> None:
    assert len({view(smooth(64, 64), 32, STRONG, seed).tobytes() for seed in range(20)}) == 20


def test_centre_view_of_a_picture_of_that_size_is_the_picture() -> None:
    pixels = picture(32, 32)
    np.testing.assert_array_equal(centre_view(pixels, 32), pixels)


@pytest.mark.parametrize(("height", "width"), [(32, 56), (56, 32)])
def test_centre_view_is_the_middle_square_of_a_picture_that_is_not_square(height: int, width: int) -> None:
    pixels = picture(height, width)
    top, left = (height - 32) // 2, (width - 32) // 2
    np.testing.assert_array_equal(centre_view(pixels, 32), pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize("length", [20, 50, 64, 100, 200])
def test_centre_view_keeps_each_place_of_the_picture(length: int) -> None:
    """Enlarged, shrunk a little and shrunk first: a smooth picture stays the same smooth picture."""
    error = np.abs(centre_view(smooth(length, length), 32).astype(int) - smooth(32, 32).astype(int))
    assert error.mean() < 5
    assert error[4:-4, 4:-4].max() < 9  # a shift by one pixel would be 5 a pixel of the view


def test_thin_lines_survive_shrinking() -> None:
    """Every source pixel has its part in the view, and no more are mixed than must be."""
    for column in range(128):
        pixels = np.full((128, 128, 3), 255, np.uint8)
        pixels[:, column] = 0
        assert centre_view(pixels, 32)[16].min() < 225, column
    stripes = np.repeat(np.tile(np.array([0, 255], np.uint8), 16), 4)
    view_of_stripes = centre_view(np.broadcast_to(stripes[None, :, None], (128, 128, 3)).copy(), 32)
    assert view_of_stripes[16, :, 0].tolist() == [0, 255] * 16


@pytest.mark.parametrize("length", [3, 17, 32, 90])
def test_plain_view_has_no_white_border(length: int) -> None:
    assert (centre_view(np.zeros((length, length, 3), np.uint8), 32) == 0).all()


def test_flip_mirrors_left_and_right() -> None:
    for length in (32, 48):  # an even number of pixels each side of the middle
        mirrored = view(smooth(length, length), 32, AugmentConfig(flip=1)).astype(int)
        plain = centre_view(smooth(length, length), 32).astype(int)
        assert np.abs(mirrored - plain[:, ::-1]).max() <= 2
        assert np.abs(mirrored - plain).max() > 100


def test_flip_comes_at_its_frequency_and_leaves_the_rest_as_it_was() -> None:
    pixels = smooth(32, 32)
    plain = centre_view(pixels, 32)
    flipped = sum(not np.array_equal(view(pixels, 32, AugmentConfig(flip=0.3), seed), plain) for seed in range(1000))
    assert 250 < flipped < 350  # three and a half deviations
    brighter = AugmentConfig(brightness=0.3)
    with_flip = brighter.model_copy(update={"flip": 1.0})
    one, other = view(pixels, 32, brighter, 5).astype(int), view(pixels, 32, with_flip, 5).astype(int)
    assert np.abs(one[:, ::-1] - other).max() <= 2  # the same brightness was drawn


def test_zoomed_out_view_is_white_around_the_picture() -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    corners = np.array([view(black, 32, AugmentConfig(max_zoom=1.5), seed)[0, 0, 0] for seed in range(200)])
    assert set(corners.tolist()) == {0, 255}
    assert 60 < (corners == 255).sum() < 140  # as often enlarged as shrunk
    for seed in range(200):
        assert (view(black, 32, AugmentConfig(max_zoom=1.5), seed)[16, 16] == 0).all()


def test_brightness_and_contrast_stay_within_their_bounds() -> None:
    grey = np.full((16, 16, 3), 100, np.uint8)
    levels = np.array([view(grey, 16, AugmentConfig(brightness=0.2), seed)[8, 8, 0] for seed in range(300)])
    assert 79 <= levels.min() < 85
    assert 115 < levels.max() <= 120
    light = np.full((16, 16, 3), 227, np.uint8)
    levels = np.array([view(light, 16, AugmentConfig(contrast=0.2), seed)[8, 8, 0] for seed in range(300)])
    assert 206 <= levels.min() < 211
    assert 242 < levels.max() <= 247


def test_jpeg_is_shrunk_while_it_is_decoded_but_not_below_the_side_that_is_needed() -> None:
    body = encoded(smooth(512, 768), "JPEG")
    for side, least in ((64, 64), (65, 128), (200, 256), (512, 512), (2000, 512)):
        pixels = decode(body, "jpg", side)
        height, width, _ = pixels.shape
        assert side <= height < 2 * side or height == 512
        assert height <= 2 * least
        assert width == height * 3 // 2
        assert np.abs(pixels.astype(int) - smooth(height, width).astype(int)).mean() < 4


@pytest.mark.parametrize(("format", "extension"), [("PNG", "png"), ("WEBP", "webp"), ("JPEG", "jpeg")])
def test_every_stored_format_is_decoded_to_rgb(format: str, extension: str) -> None:
    pixels = decode(encoded(smooth(40, 60), format), extension, 40)
    assert (pixels.shape, pixels.dtype) == ((40, 60, 3), np.uint8)
    assert np.abs(pixels.astype(int) - smooth(40, 60).astype(int)).mean() < 4


def test_palette_and_grey_pictures_become_rgb() -> None:
    target = io.BytesIO()
    Image.fromarray(smooth(20, 20)).convert("P").save(target, "PNG")
    assert decode(target.getvalue(), "png", 8).shape == (20, 20, 3)
    target = io.BytesIO()
    Image.fromarray(smooth(20, 20)).convert("L").save(target, "JPEG")
    assert decode(target.getvalue(), "jpg", 8).shape[2] == 3


@given(tokens=st.lists(st.integers(5, 99), max_size=12), share=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_dropping_tokens_keeps_both_ends_the_order_and_something_between(
    tokens: list[int], share: float, seed: int
) -> None:
    row = [2, *tokens, 3]
    kept = drop_tokens(row, share, np.random.default_rng(seed))
    assert (kept[0], kept[-1]) == (2, 3)
    rest = iter(row)
    assert all(token in rest for token in kept)  # a subsequence
    assert len(kept) > 2 or not tokens


def test_tokens_are_dropped_at_their_share() -> None:
    row = [2, *range(5, 5 + 20_000), 3]
    kept = drop_tokens(row, 0.25, np.random.default_rng(0))
    assert abs(len(kept) / len(row) - 0.75) < 0.02
    assert drop_tokens(row, 0.0, np.random.default_rng(0)) == row
