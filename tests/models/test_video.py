"""Video as in CLIP4Clip: frames in one batch, masks, the order of frames, and the tight similarity of each pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.core.errors import MisuseError, RecipeError
from mmflow.models.config import ModelConfig, VideoConfig
from mmflow.models.model import Model, build
from mmflow.models.video import TightSimilarity, VideoEncoder
from tests.models.backbones import IMAGE, PIXELS, TEXT, image_encoder

FRAMES = 4
KINDS = pytest.mark.parametrize("kind", ["mean", "sequential"])


def encoder(kind: str, model_type: str = "vit", **settings: Any) -> VideoEncoder:
    torch.manual_seed(2)
    transformer = {} if kind == "mean" else {"layers": 1, "heads": 2}
    video = VideoConfig.model_validate({"kind": kind, "max_frames": FRAMES, **transformer, **settings})
    return image_encoder(model_type, video)


def clips(batch_size: int, frames: int) -> Tensor:
    return torch.randn(batch_size, frames, 3, PIXELS, PIXELS)


@pytest.mark.parametrize("model_type", IMAGE)
def test_mean_equals_the_mean_of_frames_encoded_one_by_one(model_type: str) -> None:
    read, pixels = encoder("mean", model_type).eval(), clips(2, 3)
    expected = torch.stack([read.encoder(pixels[:, frame]).pooled_BW for frame in range(3)], 1)
    encoded = read(pixels)
    torch.testing.assert_close(encoded.sequence_BTW, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encoded.pooled_BW, expected.mean(1), atol=1e-6, rtol=1e-5)


def test_sequential_adds_the_output_of_its_transformer() -> None:
    read, pixels = encoder("sequential").eval(), clips(2, 3)
    frames = read.encoder(pixels.flatten(0, 1)).pooled_BW.view(2, 3, -1)
    ordered, _ = read.order(frames, None)
    encoded = read(pixels, attentions=True)
    torch.testing.assert_close(read(pixels).pooled_BW, (frames + ordered).mean(1))
    assert [map_BHFF.shape for map_BHFF in encoded.attentions] == [(2, 2, 3, 3)]


def test_only_sequential_reads_the_order_of_frames() -> None:
    pixels = clips(2, 3)
    mean, sequential = encoder("mean").eval(), encoder("sequential").eval()
    torch.testing.assert_close(mean(pixels.flip(1)).pooled_BW, mean(pixels).pooled_BW)
    assert not torch.allclose(sequential(pixels.flip(1)).pooled_BW, sequential(pixels).pooled_BW, atol=1e-4)


@KINDS
def test_padding_changes_nothing(kind: str) -> None:
    read, pixels = encoder(kind).eval(), clips(2, 4)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    padded = read(pixels, mask)
    alone = read(pixels[:1, :2])
    torch.testing.assert_close(padded.pooled_BW[:1], alone.pooled_BW, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.sequence_BTW[:1, :2], alone.sequence_BTW, atol=1e-6, rtol=1e-5)
    assert torch.equal(padded.mask_BT, mask)
    stills = pixels[:, :1]  # a still is a clip of one frame
    torch.testing.assert_close(read(stills[:, 0]).pooled_BW, read(stills).pooled_BW)


@KINDS
def test_real_frames_go_through_the_image_encoder_in_one_batch(kind: str) -> None:
    read, shapes = encoder(kind, "resnet"), []
    read.encoder.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    read(clips(2, 3), torch.tensor([[True, True, False], [True, False, False]]))
    read(clips(2, 3))
    assert shapes == [(3, 3, PIXELS, PIXELS), (6, 3, PIXELS, PIXELS)]


@KINDS
def test_a_clip_without_frames_is_finite(kind: str) -> None:
    read = encoder(kind)
    encoded = read(clips(2, 3), torch.tensor([[True] * 3, [False] * 3]))
    encoded.pooled_BW.square().sum().backward()
    assert encoded.pooled_BW.isfinite().all()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in read.parameters())


MODEL: dict[str, Any] = {
    "image": {"type": "vit", "options": IMAGE["vit"], "pooling": "first"},
    "text": {"type": "bert", "options": TEXT["bert"]},
    "video": {"kind": "tight", "max_frames": FRAMES, "layers": 1, "heads": 2},
    "embedding_width": 6,
    "image_pixels": PIXELS,
    "max_tokens": 7,
    "vocabulary_size": 64,
}


def similarity() -> TightSimilarity:
    torch.manual_seed(3)
    return TightSimilarity("m.video", VideoConfig.model_validate(MODEL["video"]), 8, image_width=5, text_width=7)


def model_of(**changes: Any) -> Model:
    return build("m", ModelConfig.model_validate(MODEL | changes), 64, seed=0).eval()


def test_tight_scores_equal_the_papers_pair_by_pair() -> None:
    """CLIP4Clip, section 3.3: U = [w, z₁ … z_F], s = FC(ReLU(FC(Transformer(U + P + T)[0])))."""
    tight = similarity()
    captions, frames = torch.randn(3, 7), torch.randn(2, FRAMES, 5)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    scores = tight(captions, frames, mask)
    assert scores.shape == (3, 2)
    flipped = tight(captions, frames.flip(1), mask)
    assert not torch.allclose(flipped[:, 1], scores[:, 1], atol=1e-4)  # the order of frames is read
    for row in range(3):
        for column in range(2):
            real = frames[column][mask[column]]
            union = torch.cat([tight.text_projection(captions[row : row + 1]), tight.image_projection(real)])
            union = union + tight.types.weight[torch.tensor([0] + [1] * len(real))]
            read, _ = tight.read(union[None], None)
            first, relu, second = tight.score
            expected = second(relu(first(read[0, 0])))[0]
            torch.testing.assert_close(scores[row, column], expected, atol=1e-6, rtol=1e-5)


def test_a_tight_model_has_no_embeddings_and_trains_all_weights() -> None:
    model = model_of()
    assert model.gives == {"pair_scores"}
    assert model.scale is None
    encoded = model.encode_image(clips(2, 3), torch.tensor([[True] * 3, [False] * 3]))
    text = model.encode_text(torch.randint(5, 60, (4, 7)), torch.ones(4, 7))
    scores = model.score_pairs(text.pooled_BW, encoded)
    assert scores.shape == (4, 2)
    scores.square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    with pytest.raises(MisuseError, match="the model has no shared space"):
        model.embed_image(encoded)
    with pytest.raises(MisuseError, match="the model has no tight similarity"):
        model_of(video={"max_frames": FRAMES}).score_pairs(text.pooled_BW, encoded)


def test_a_tight_model_reads_a_still_as_a_clip_of_one_frame() -> None:
    model, stills, text = model_of(), clips(2, 1), torch.randn(3, 8)
    alone, clip = model.encode_image(stills[:, 0]), model.encode_image(stills, torch.ones(2, 1))
    torch.testing.assert_close(model.score_pairs(text, alone), model.score_pairs(text, clip))


def test_settings_that_do_not_fit_a_clip_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^m.video.max_frames: 4, but a clip has 5; raise it"):
        encoder("mean")(clips(1, 5))
    with pytest.raises(RecipeError, match=r"^m.video.heads: 3 does not divide the width, 8"):
        encoder("sequential", heads=3)
    with pytest.raises(RecipeError, match=r"^m.video.heads: 4 does not divide the width, 6"):
        model_of(video=MODEL["video"] | {"heads": 4})
