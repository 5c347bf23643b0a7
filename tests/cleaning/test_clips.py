"""Clips: evenly spaced frames of animations and frame folders, at a bounded cost whatever the header claims."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmflow.cleaning.config import ImageConfig
from mmflow.cleaning.images import PreparedImage, prepare_images
from mmflow.imaging.decode import evenly_spaced
from mmflow.sources.reasons import Reason, Rejected
from tests.imaging.picture_files import chunk, clip_of, file_of, gif, gradient, opened, overwrite, reds

EXACT = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "AVIF": {"quality": 100}}


def levels(prepared: PreparedImage) -> list[int]:
    """How red the corner of each stored frame is."""
    return [int(opened(file)[0, 0, 0]) for file in (prepared.data, *prepared.frames)]


def rejection(*bodies: bytes, **settings: object) -> Rejected:
    with pytest.raises(Rejected) as rejected:
        prepare_images(bodies, ImageConfig(**settings))  # type: ignore[arg-type]
    return rejected.value


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_kept_frames_are_evenly_spaced_from_the_first(count: int, max_frames: int) -> None:
    numbers = evenly_spaced(count, max_frames)
    assert numbers[0] == 0
    assert numbers[-1] < count
    assert len(numbers) == min(count, max_frames)
    gaps = np.diff([*numbers, count])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("format", EXACT)
def test_an_animation_is_stored_as_an_image_and_frames(format: str) -> None:
    body = clip_of(reds(range(0, 200, 10)), format, **EXACT[format])
    prepared = prepare_images([body], ImageConfig(max_frames=4, side=32))
    assert np.abs(np.array(levels(prepared)) - [0, 50, 100, 150]).max() <= 2
    assert (prepared.width, prepared.height, prepared.extension) == (43, 32, "jpg")
    assert {opened(file).shape for file in (prepared.data, *prepared.frames)} == {(32, 43, 3)}
    assert len(prepare_images([body], ImageConfig(max_frames=16)).frames) == 15
    assert len(prepare_images([body], ImageConfig(max_frames=99)).frames) == 19
    (first,) = levels(prepare_images([clip_of(reds([90, 10]), format, **EXACT[format])], ImageConfig(max_frames=1)))
    assert abs(first - 90) <= 2


def test_the_hashes_of_a_clip_cover_all_its_frames() -> None:
    settings = ImageConfig()
    frame = gradient(60, 80)
    still, moving, constant = (
        prepare_images([file_of(frame) for frame in frames], settings)
        for frames in ([frame], [frame, frame[::-1]], [frame] * 3)
    )
    assert still.data == moving.data == constant.data
    assert len({still.pixel_hash, moving.pixel_hash, constant.pixel_hash}) == 3
    assert still.perceptual_hash == constant.perceptual_hash != moving.perceptual_hash


def test_transparent_frames_show_the_background() -> None:
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((250, 0, 0, 255), (number * 8, 0, number * 8 + 8, 32))
    for format, disposal in (("GIF", 2), ("PNG", 1)):
        body = clip_of(frames, format, disposal=disposal)
        prepared = prepare_images([body], ImageConfig(background=(0, 0, 255), quality=100))
        for number, file in enumerate((prepared.data, *prepared.frames)):
            row = opened(file)[16]
            assert np.abs(row[number * 8 + 2 : number * 8 + 6] - [250, 0, 0]).max() < 12, (format, number)
            assert np.abs(row[28:] - [0, 0, 255]).max() < 12, (format, number)


def test_the_still_picture_of_an_animated_png_is_not_its_first_frame() -> None:
    body = clip_of(reds([200, 10, 30]), "PNG", default_image=True)
    assert levels(prepare_images([body], ImageConfig())) == [10, 30]


def test_pages_of_a_tiff_are_not_frames() -> None:
    prepared = prepare_images([clip_of(reds([10, 60, 200]), "TIFF")], ImageConfig())
    assert levels(prepared) == [10]


def test_all_frames_of_a_folder_get_the_size_of_the_first() -> None:
    bodies = [file_of(gradient(300, 400), "JPEG"), file_of(gradient(60, 200)), file_of(gradient(900, 600), "WEBP")]
    for resize, size in {"shortest": (128, 96), "longest": (96, 72), "crop": (96, 96), "none": (400, 300)}.items():
        prepared = prepare_images(bodies, ImageConfig(side=96, resize=resize))
        assert (prepared.width, prepared.height) == size
        assert {opened(file).shape for file in (prepared.data, *prepared.frames)} == {(size[1], size[0], 3)}
    wide = opened(prepare_images(bodies, ImageConfig(side=96)).frames[0])
    assert wide[48, 64].tolist() == pytest.approx([127, 127, 127], abs=4)  # the centre stays in the centre
    assert 60 < wide[48, 0, 0] < 90  # a frame wider than the first is cropped on both sides


def test_only_kept_frames_are_decoded() -> None:
    bodies = [file_of(frame) for frame in reds(range(0, 100, 10))]
    bodies[1] = b"not an image"
    assert levels(prepare_images(bodies, ImageConfig(max_frames=5))) == [0, 20, 40, 60, 80]
    assert levels(prepare_images(bodies, ImageConfig(max_frames=1))) == [0]
    rejected = rejection(*bodies, max_frames=10)
    assert rejected.reason is Reason.image_not_an_image
    assert rejected.detail.startswith("frame 2 of 10: ")


def test_conforming_frames_keep_their_bytes() -> None:
    bodies = [file_of(frame, "JPEG") for frame in reds([10, 60], 128, 96)] + [file_of(reds([200], 256, 192)[0], "JPEG")]
    prepared = prepare_images(bodies, ImageConfig(side=96))
    assert (prepared.data, prepared.frames[0]) == (bodies[0], bodies[1])
    assert opened(prepared.frames[1]).shape == (96, 128, 3)


def test_a_wrong_frame_count_in_the_header_is_rejected_quickly() -> None:
    body = clip_of(reds(range(0, 100, 10)), "PNG")
    control = body.index(b"acTL") + 4
    for claim in (11, 2**31 - 1):
        start = time.process_time()
        rejected = rejection(overwrite(body, control - 8, chunk(b"acTL", struct.pack(">II", claim, 0))))
        assert time.process_time() - start < 1
        assert rejected.reason is Reason.image_truncated
        assert str(claim) in rejected.detail
    fewer = overwrite(body, control - 8, chunk(b"acTL", struct.pack(">II", 3, 0)))
    assert levels(prepare_images([fewer], ImageConfig())) == [0, 10, 20]


def test_an_animation_with_too_many_pixels_is_rejected_at_once() -> None:
    body = gif(4000, 3000, [(1, 1)] * 200)
    start = time.process_time()
    rejected = rejection(body, max_pixels=80_000_000)
    assert rejected.reason is Reason.image_too_large
    assert "188 frames" in rejected.detail
    assert time.process_time() - start < 1
    assert prepare_images([body], ImageConfig(max_frames=1)).width == 341


def test_a_frame_larger_than_the_screen_is_rejected() -> None:
    refusals = (Reason.image_unsupported, Reason.image_too_large)
    for side in (100, 13_000, 65_535):
        assert rejection(gif(64, 64, [(1, 1), (side, side)])).reason in refusals


@pytest.mark.parametrize("format", EXACT)
def test_a_truncated_animation_is_rejected(format: str) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(6)]
    body = clip_of(frames, format, **EXACT[format])
    for fraction in (0.3, 0.55, 0.9):
        assert rejection(body[: int(len(body) * fraction)]).reason is Reason.image_truncated, fraction
