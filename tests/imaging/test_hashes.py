"""Image hashes: exact ones cover every pixel, perceptual ones survive common edits of pictures on the web."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw

from mmflow.imaging.hashes import (
    GAP_SCALED,
    NO_DIFFERENCE,
    UNIFORM,
    _cosines,
    clip_pixel_hash,
    perceptual_hash,
    pixel_hash,
    thumbnail,
)
from tests.imaging.picture_files import RGB, file_of, gradient, opened


def drawing(seed: int, side: int = 256) -> RGB:
    """Some filled shapes on white; every second one is symmetric, as icons are."""
    draw = random.Random(seed)
    image = Image.new("RGB", (side, side), "white")
    canvas = ImageDraw.Draw(image)
    for _ in range(5):
        left, top = draw.randrange(side * 3 // 4), draw.randrange(side * 3 // 4)
        box = (left, top, left + draw.randrange(20, side // 2), top + draw.randrange(20, side // 2))
        paint = canvas.ellipse if draw.random() < 0.5 else canvas.rectangle
        paint(box, fill=(draw.randrange(256), draw.randrange(256), draw.randrange(256)))
    pixels = np.asarray(image)
    return np.minimum(pixels, pixels[:, ::-1]) if seed % 2 else pixels


CHANGES: dict[str, Callable[[RGB], RGB]] = {
    "quality 75": lambda image: opened(file_of(image, "JPEG", quality=75)).astype(np.uint8),
    "half size": lambda image: np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.LANCZOS)),
    "200 pixels": lambda image: np.asarray(Image.fromarray(image).resize((200, 200), Image.Resampling.BICUBIC)),
    "brighter": lambda image: np.minimum(image.astype(int) + 10, 255).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_perceptual_hash_survives_common_edits(change: str) -> None:
    distances = [
        (perceptual_hash(image) ^ perceptual_hash(CHANGES[change](image))).bit_count()
        for image in map(drawing, range(40))
    ]
    assert max(distances) <= 6
    assert np.mean(distances) <= 1


def test_different_drawings_have_distant_hashes() -> None:
    hashes = [perceptual_hash(drawing(seed)) for seed in range(40)]
    distances = [(first ^ second).bit_count() for first, second in combinations(hashes, 2)]
    assert min(distances) > 4
    assert np.percentile(distances, 5) > 10
    assert 24 < np.median(distances) < 36


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (31, 33), (77, 131), (256, 341)])
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 31)])
def test_uniform_images_have_one_perceptual_hash(size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    image = np.full((*size, 3), colour, np.uint8)
    cells = thumbnail(image)
    assert cells.min() == cells.max() == 2 * (38 * colour[0] + 75 * colour[1] + 15 * colour[2])
    assert perceptual_hash(image) == UNIFORM


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 150), st.integers(1, 150), st.just(3))))
@settings(max_examples=60, deadline=None)
def test_thumbnail_is_the_average_of_equal_areas(image: RGB) -> None:
    def shares(pixels: int) -> npt.NDArray[np.float64]:
        cell, pixel = np.arange(32)[:, None] * pixels, np.arange(pixels)[None] * 32
        return np.maximum(np.minimum(cell + pixels, pixel + 32) - np.maximum(cell, pixel), 0) / pixels

    grey = image @ np.array([76, 150, 30])
    expected = shares(image.shape[0]) @ grey @ shares(image.shape[1]).T
    error = np.abs(thumbnail(image) - expected)
    # Up to 127 pixels a block is a pixel; beyond, cells are cut at 32nds of a block instead of within it.
    assert error.max() <= (1 if max(image.shape) < 128 else 256 * 255 / 8)


@given(st.integers(1, 2000), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_the_thumbnail_covers_the_corner_pixels(height: int, width: int) -> None:
    image = np.full((height, width, 3), 128, np.uint8)
    before = thumbnail(image)
    image[0, 0] = image[-1, -1] = 255
    after = thumbnail(image)
    assert after[0, 0] > before[0, 0]
    assert after[31, 31] > before[31, 31]


def test_hashes_are_the_same_on_every_machine() -> None:
    image = gradient(256, 341)
    # Pinned: other machines compare with stored hashes, so a changed algorithm would change every dataset.
    assert pixel_hash(image) == xxhash.xxh3_64_intdigest(np.array(image.shape, "<u4").tobytes() + image.tobytes())
    assert f"{perceptual_hash(drawing(2)):016x}" == "6b0f9c7070d4974c"
    assert f"{perceptual_hash(drawing(3)):016x}" == "1bece613934e6c9b"
    assert f"{UNIFORM:016x}" == "3366cc993366cc99"


def test_sums_are_exact_so_their_order_does_not_matter() -> None:
    image = np.random.default_rng(0).integers(0, 256, (301, 263, 3), dtype=np.uint8)
    exact = _cosines().astype(int).astype(object)
    spectrum = (exact @ thumbnail(image).astype(object) @ exact.T).ravel()
    gap, median = int(GAP_SCALED), sorted(spectrum[1:])[31]
    thresholds = [median - gap if favoured else median + gap for favoured in NO_DIFFERENCE.ravel()]
    bits = "".join(str(int(value > at)) for value, at in zip(spectrum[1:], thresholds[1:], strict=True))
    assert perceptual_hash(image) == int(bits, 2)
    assert gap == GAP_SCALED


def test_gradients_in_four_directions_have_different_hashes() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, axis=0).repeat(3, axis=2)
    rotations = (ramp, ramp[:, ::-1], ramp.swapaxes(0, 1), ramp[:, ::-1].swapaxes(0, 1))
    assert len({UNIFORM, *map(perceptual_hash, rotations)}) == 5


def test_the_pixel_hash_covers_every_pixel_and_the_shape() -> None:
    image = gradient(40, 60)
    assert pixel_hash(image) == pixel_hash(np.asfortranarray(image)) == pixel_hash(image.copy())
    changed = image.copy()
    changed[39, 59, 2] ^= 1
    assert pixel_hash(changed) != pixel_hash(image)
    assert pixel_hash(image.reshape(60, 40, 3)) != pixel_hash(image)


def test_the_clip_hash_covers_all_frames_in_order() -> None:
    assert clip_pixel_hash([5]) == 5
    assert len({clip_pixel_hash(frames) for frames in ([5, 6], [6, 5], [5, 6, 6], [5])}) == 4
