"""Clips as CLIP4Clip reads them: frames in one batch, masks honoured, order heeded where the kind says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.models.config import ImageEncoderConfig, VideoConfig
from mmflow.models.model import build_image_encoder
from mmflow.models.video import VideoEncoder
from tests.models.backbones import IMAGE

PIXELS = 16


def encoder(kind: str, model_type: str = "vit", **settings: Any) -> VideoEncoder:
    torch.manual_seed(2)
    image = ImageEncoderConfig(type=model_type, options=IMAGE[model_type])
    transformer = {} if kind == "mean" else {"layers": 1, "heads": 2}
    video = VideoConfig.model_validate({"kind": kind, "max_frames": 4, **transformer, **settings})
    built = build_image_encoder("m.image", image, PIXELS, video)
    assert isinstance(built, VideoEncoder)
    return built


def clips(batch_size: int, frames: int) -> Tensor:
    return torch.randn(batch_size, frames, 3, PIXELS, PIXELS)


@pytest.mark.parametrize("model_type", IMAGE)
def test_the_mean_is_that_of_the_frames_one_by_one(model_type: str) -> None:
    read = encoder("mean", model_type).eval()
    pixels = clips(2, 3)
    expected = torch.stack([read.encoder(pixels[:, frame]).pooled_BW for frame in range(3)], 1)
    encoded = read(pixels)
    torch.testing.assert_close(encoded.sequence_BTW, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encoded.pooled_BW, expected.mean(1), atol=1e-6, rtol=1e-5)


def test_sequential_adds_what_the_frames_read_of_each_other() -> None:
    read = encoder("sequential").eval()
    assert read.order is not None
    pixels = clips(2, 3)
    frames = read.encoder(pixels.flatten(0, 1)).pooled_BW.view(2, 3, -1)
    ordered, _ = read.order(frames, None)
    torch.testing.assert_close(read(pixels).pooled_BW, (frames + ordered).mean(1))


def test_only_sequential_heeds_the_order_of_frames() -> None:
    pixels = clips(2, 3)
    mean, sequential = encoder("mean").eval(), encoder("sequential").eval()
    torch.testing.assert_close(mean(pixels.flip(1)).pooled_BW, mean(pixels).pooled_BW)
    assert not torch.allclose(sequential(pixels.flip(1)).pooled_BW, sequential(pixels).pooled_BW, atol=1e-4)


@pytest.mark.parametrize("kind", ["mean", "sequential"])
def test_padding_changes_nothing(kind: str) -> None:
    read = encoder(kind).eval()
    pixels = clips(2, 4)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    padded = read(pixels, mask)
    alone = read(pixels[:1, :2])
    torch.testing.assert_close(padded.pooled_BW[:1], alone.pooled_BW, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.sequence_BTW[:1, :2], alone.sequence_BTW, atol=1e-6, rtol=1e-5)
    assert torch.equal(padded.mask_BT, mask)


@pytest.mark.parametrize("kind", ["mean", "sequential"])
def test_frames_go_through_the_image_encoder_at_once_and_padding_not_at_all(kind: str) -> None:
    read = encoder(kind, "resnet")
    shapes = []
    read.encoder.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    read(clips(2, 3), mask)
    read(clips(2, 3))
    assert shapes == [(3, 3, PIXELS, PIXELS), (6, 3, PIXELS, PIXELS)]


@pytest.mark.parametrize("kind", ["mean", "sequential"])
def test_a_clip_without_frames_is_finite(kind: str) -> None:
    read = encoder(kind)
    encoded = read(clips(2, 3), torch.tensor([[True] * 3, [False] * 3]))
    encoded.pooled_BW.square().sum().backward()
    assert encoded.pooled_BW.isfinite().all()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in read.parameters())


@pytest.mark.parametrize("kind", ["mean", "sequential"])
def test_a_still_is_a_clip_of_one_frame(kind: str) -> None:
    read = encoder(kind).eval()
    pixels = clips(2, 1)
    torch.testing.assert_close(read(pixels[:, 0]).pooled_BW, read(pixels).pooled_BW)


def test_maps_are_those_among_frames() -> None:
    encoded = encoder("sequential").eval()(clips(2, 3), attentions=True)
    assert [each.shape for each in encoded.attentions] == [(2, 2, 3, 3)]


def test_more_frames_than_the_recipe_says_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^m.video.max_frames: 4, and a clip has 5; raise it"):
        encoder("mean")(clips(1, 5))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    said = r"^m.video.heads: 3 do not divide the width, 8; give another number"
    with pytest.raises(RecipeError, match=said):
        encoder("sequential", heads=3)
