"""Images: any file becomes an upright stored image of the requested size on the background colour, or a rejection."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmflow.cleaning.config import ImageConfig
from mmflow.cleaning.images import PreparedImage, encode, fit, prepare_images, stored_size
from mmflow.imaging.decode import decode_source, flatten
from mmflow.imaging.hashes import perceptual_hash, pixel_hash
from mmflow.imaging.header import TURNS, probe
from mmflow.sources.reasons import Reason, Rejected
from tests.imaging.picture_files import RGB, clip_of, file_of, gradient, opened, reds


def prepared(data: bytes, **changes: object) -> PreparedImage:
    return prepare_images([data], ImageConfig(**{"side": 64, "min_side": 8, **changes}))  # type: ignore[arg-type]


def rejection(data: bytes, **changes: object) -> Reason:
    with pytest.raises(Rejected) as rejected:
        prepared(data, **changes)
    assert "\n" not in rejected.value.detail
    return rejected.value.reason


def exif_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def decode(data: bytes, side: int) -> RGB:
    return flatten(decode_source(data, probe(data), side), (255, 255, 255))


def noise(side: int = 128) -> Image.Image:
    return Image.effect_noise((side, side), 80).convert("RGB")


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_like_in_pillow(orientation: int, format: str) -> None:
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    data = file_of(gradient(40, 64), format, exif=exif_orientation(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decode(data, 4096).astype(int) - expected).max() <= 3
    stored = prepared(data, resize="none", quality=95)
    assert (stored.height, stored.width) == expected.shape[:2]
    assert np.abs(opened(stored.data) - expected).mean() < 3
    assert "exif" not in Image.open(io.BytesIO(stored.data)).info or orientation == 1


@pytest.mark.parametrize("policy", ["none", "shortest", "longest", "crop"])
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 4096))
def test_stored_size_follows_the_policy_and_never_enlarges(policy: str, width: int, height: int, side: int) -> None:
    new = stored_size((width, height), policy, side)
    assert 1 <= new[0] <= width
    assert 1 <= new[1] <= height
    shortest, longest = min(width, height), max(width, height)
    if policy == "none":
        assert new == (width, height)
    elif policy == "crop":
        assert new == (min(shortest, side),) * 2
    else:
        new_side, old_side = (min(new), shortest) if policy == "shortest" else (max(new), longest)
        assert new_side == min(old_side, side)
        assert new[0] / width == pytest.approx(new[1] / height, abs=0.51 * (1 / width + 1 / height) + 1 / shortest)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize(
    ("policy", "size"), {"none": (900, 600), "shortest": (96, 64), "longest": (64, 43), "crop": (64, 64)}.items()
)
def test_every_format_is_resized_without_changing_the_picture(format: str, policy: str, size: tuple[int, int]) -> None:
    stored = prepared(file_of(gradient(600, 900), format), resize=policy)
    assert (stored.width, stored.height) == size
    image = opened(stored.data)
    assert image.shape == (size[1], size[0], 3)
    expected = gradient(size[1], size[0])
    if policy == "crop":
        expected = np.asarray(Image.fromarray(gradient(600, 900)[:, 150:750]).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(image - expected).mean() < 6


def test_a_small_image_is_cropped_and_not_enlarged() -> None:
    stored = prepared(file_of(gradient(30, 50)), resize="crop", quality=100)
    assert (stored.width, stored.height) == (30, 30)
    assert np.abs(opened(stored.data) - gradient(30, 50)[:, 10:40]).max() <= 4


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_fit_resizes_any_image_to_any_size(height: int, width: int, new_height: int, new_width: int) -> None:
    image = np.full((height, width, 3), (10, 200, 90), np.uint8)
    fitted = np.asarray(fit(Image.fromarray(image), (new_width, new_height)))
    assert fitted.shape == (new_height, new_width, 3)
    assert (fitted == [10, 200, 90]).all()


def test_jpeg_is_reduced_while_it_decodes() -> None:
    data = file_of(gradient(1024, 1536), "JPEG")
    assert decode(data, 120).shape == (128, 192, 3)
    cmyk = file_of(Image.fromarray(gradient(1024, 1536)).convert("CMYK"), "JPEG")
    assert decode(cmyk, 120).shape == (128, 192, 3)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_encoding_is_faithful_and_repeatable(format: str) -> None:
    image = gradient(48, 64)
    data = encode(image, format, 90)
    assert data == encode(image, format, 90)
    assert np.abs(opened(data) - image).mean() < 3


@pytest.mark.parametrize(
    ("format", "data"),
    [
        ("jpeg", file_of(gradient(64, 96), "JPEG", quality=60)),
        (
            "jpeg",
            file_of(gradient(64, 96), "JPEG", quality=95, progressive=True, exif=exif_orientation(1), comment=b"mine"),
        ),
        ("webp", file_of(gradient(64, 96), "WEBP")),
        ("webp", file_of(gradient(64, 96), "WEBP", lossless=True)),
    ],
)
def test_conforming_files_are_stored_byte_for_byte(format: str, data: bytes) -> None:
    stored = prepared(data, format=format)
    assert stored.data == data
    pixels: RGB = opened(data).astype(np.uint8)
    assert stored.perceptual_hash == perceptual_hash(pixels)
    assert stored.pixel_hash == pixel_hash(decode(data, 64))
    assert prepared(data, format=format, keep_conforming=False).data != data


@pytest.mark.parametrize(
    "data",
    [
        file_of(gradient(64, 96)),  # another format
        file_of(gradient(64, 96), "WEBP"),
        file_of(gradient(65, 96), "JPEG"),  # another size
        file_of(gradient(64, 96), "JPEG", exif=exif_orientation(3)),
        file_of(gradient(64, 96)[..., 0], "JPEG"),  # grey
        file_of(Image.fromarray(gradient(64, 96)).convert("CMYK"), "JPEG"),
    ],
)
def test_other_files_are_encoded_again(data: bytes) -> None:
    stored = prepared(data)
    assert stored.data != data
    image = Image.open(io.BytesIO(stored.data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (stored.width, stored.height))
    assert image.getexif().get(0x0112, 1) == 1


def test_transparent_and_animated_webp_files_are_encoded_again() -> None:
    translucent = Image.fromarray(gradient(64, 64)).convert("RGBA")
    translucent.putalpha(100)
    data = file_of(translucent, "WEBP", lossless=True)
    stored = prepared(data, format="webp", background=(0, 0, 0))
    assert stored.data != data
    assert opened(stored.data).mean() == pytest.approx(gradient(64, 64).mean() * 100 / 255, abs=2)
    clip = clip_of(reds([10, 200], 64, 64), "WEBP")
    assert prepared(clip, format="webp", max_frames=1).data != clip


def test_hashes_describe_the_stored_pixels() -> None:
    large, small = gradient(600, 900), gradient(60, 90)
    exact = np.asarray(fit(Image.fromarray(large), (96, 64)))
    stored = prepared(file_of(large))
    assert (stored.pixel_hash, stored.perceptual_hash) == (pixel_hash(exact), perceptual_hash(exact))
    assert len({prepared(file_of(small, format)).pixel_hash for format in ("PNG", "BMP", "TIFF", "PPM")}) == 1


def test_a_size_that_the_encoder_cannot_write_is_rejected() -> None:
    long = file_of(Image.new("L", (70_000, 8)))
    for format in ("jpeg", "webp"):
        assert rejection(long, resize="none", max_aspect=10_000, format=format) is Reason.image_too_large
    assert prepared(long, resize="longest", max_aspect=10_000).width == 64
    assert rejection(file_of(Image.new("L", (20_000, 8))), resize="none", max_aspect=1e4, format="webp")


def test_truncated_files_are_rejected() -> None:
    assert rejection(b"") is Reason.image_truncated
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"):
        data = file_of(noise(), format)
        for share in (0.1, 0.5, 0.9):
            assert rejection(data[: int(len(data) * share)]) is Reason.image_truncated, (format, share)


def test_a_truncated_conforming_file_is_rejected() -> None:
    for format in ("JPEG", "WEBP"):
        data = file_of(noise(64), format)
        for kept in (len(data) // 2, len(data) - 40):
            assert rejection(data[:kept], format=format.lower()) is Reason.image_truncated
    progressive = file_of(noise(64), "JPEG", progressive=True)
    assert rejection(progressive[: len(progressive) * 2 // 3]) is Reason.image_truncated


def test_harmless_stray_bytes_do_not_reject_an_image() -> None:
    jpeg = file_of(gradient(64, 64), "JPEG", quality=95)
    tables = jpeg.index(b"\xff\xdb")
    for sloppy in (jpeg + b"trailing", jpeg[:tables] + bytes(2) + jpeg[tables:]):
        stored = prepared(sloppy)
        assert np.abs(opened(stored.data) - opened(jpeg)).max() <= 6
        assert (stored.width, stored.height, stored.extension) == (64, 64, "jpg")


def test_a_second_header_in_a_jpeg_does_not_bypass_the_bounds() -> None:
    jpeg = file_of(gradient(64, 64), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    segment = jpeg[frame : frame + 19]
    huge = segment[:5] + b"\xea\x60\xea\x60" + segment[9:]  # 60,000 × 60,000
    for headers in (huge + segment, segment + huge):
        start = time.process_time()
        rejection(jpeg[:frame] + headers + jpeg[frame + 19 :])
        assert time.process_time() - start < 0.5


RED_CLIP = reds(range(0, 120, 20), 24, 20)
VALID = {
    **{
        format: file_of(noise(40), format)
        for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
    },
    "PPM": file_of(noise(40), "PPM"),
    "progressive": file_of(noise(40), "JPEG", progressive=True, exif=exif_orientation(6)),
    "CMYK": file_of(noise(40).convert("CMYK"), "JPEG"),
    "palette": file_of(noise(40).quantize(16), transparency=3),
    "LZW": file_of(noise(40), "TIFF", compression="tiff_lzw"),
    **{f"{format} clip": clip_of(RED_CLIP, format) for format in ("GIF", "PNG", "WEBP", "AVIF")},
}


@pytest.mark.parametrize("name", VALID)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
    spliced=st.one_of(st.none(), st.tuples(st.floats(0, 1), st.binary(max_size=12))),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_files_are_prepared_or_rejected_and_raise_nothing_else(
    name: str, edits: list[tuple[float, int]], kept: float, spliced: tuple[float, bytes] | None
) -> None:
    body = bytearray(VALID[name])
    for place, value in edits:
        # Half of the edits hit the first hundred bytes, where the headers are.
        body[int(place * 2 * min(100, len(body))) if place < 0.5 else int(place * len(body))] = value
    del body[int(kept * len(body)) :]
    if spliced:
        at = int(spliced[0] * len(body))
        body[at:at] = spliced[1]
    configuration = ImageConfig(side=32, max_pixels=200_000, max_frames=3, format="webp" if "WEBP" in name else "jpeg")
    try:
        stored = prepare_images([bytes(body)], configuration)
    except Rejected:
        return
    for file in (stored.data, *stored.frames):
        image = Image.open(io.BytesIO(file))
        assert image.size == (stored.width, stored.height)
        image.load()
    assert 0 <= stored.pixel_hash < 2**64
    assert 0 <= stored.perceptual_hash < 2**64
