"""CLIP4Clip's tight similarity: each caption read with each clip, equal to the paper's, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmflow.core.errors import MisuseError, RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model, build
from mmflow.models.video import TightSimilarity

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
PIXELS, TOKENS, FRAMES = 8, 7, 4
MODEL: dict[str, Any] = {
    "image": {"type": "vit", "options": {**SMALL, "patch_size": 4}, "pooling": "first"},
    "text": {"type": "bert", "options": {**SMALL, "max_position_embeddings": TOKENS}},
    "video": {"kind": "tight", "max_frames": FRAMES, "layers": 1, "heads": 2},
    "embedding_width": 6,
    "image_pixels": PIXELS,
    "max_tokens": TOKENS,
    "vocabulary_size": 64,
}


def similarity() -> TightSimilarity:
    torch.manual_seed(3)
    return TightSimilarity("m.video", ModelConfig.model_validate(MODEL).video, 8, image_width=5, text_width=7)


def model_of(**changes: Any) -> Model:
    return build("m", ModelConfig.model_validate(MODEL | changes), 64, seed=0).eval()


def test_scores_equal_the_papers_pair_by_pair() -> None:
    """CLIP4Clip, section 3.3: U = [w, z₁ … z_F], s = FC(ReLU(FC(Transformer(U + P + T)[0])))."""
    tight = similarity()
    captions, frames = torch.randn(3, 7), torch.randn(2, FRAMES, 5)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    scores = tight(captions, frames, mask)
    assert scores.shape == (3, 2)
    for row in range(3):
        for column in range(2):
            real = frames[column][mask[column]]
            union = torch.cat([tight.text_projection(captions[row : row + 1]), tight.image_projection(real)])
            union = union + tight.types.weight[torch.tensor([0] + [1] * len(real))]
            read, _ = tight.read(union[None], None)
            first, relu, second = tight.score
            expected = second(relu(first(read[0, 0])))[0]
            torch.testing.assert_close(scores[row, column], expected, atol=1e-6, rtol=1e-5)


def test_scores_heed_the_order_of_frames_and_train_every_weight() -> None:
    tight = similarity()
    captions, frames, mask = torch.randn(3, 7), torch.randn(2, FRAMES, 5), torch.ones(2, FRAMES, dtype=torch.bool)
    scores = tight(captions, frames, mask)
    assert not torch.allclose(tight(captions, frames.flip(1), mask), scores, atol=1e-4)
    scores.square().sum().backward()
    assert [name for name, each in tight.named_parameters() if each.grad is None] == []


def test_a_model_that_scores_pairs_has_no_embeddings_and_nothing_untrained() -> None:
    model = model_of()
    assert model.gives == {"pair_scores"}
    assert model.scale is None
    clips = model.encode_image(torch.randn(2, 3, 3, PIXELS, PIXELS), torch.tensor([[True] * 3, [False] * 3]))
    text = model.encode_text(torch.randint(5, 60, (4, TOKENS)), torch.ones(4, TOKENS))
    scores = model.score_pairs(text.pooled_BW, clips)
    assert scores.shape == (4, 2)
    scores.square().sum().backward()
    untrained = [name for name, each in model.named_parameters() if each.grad is None]
    assert not [name for name in untrained if "pooler" not in name]
    with pytest.raises(MisuseError, match="the model has no shared space"):
        model.embed_image(clips)
    with pytest.raises(MisuseError, match="the model has no tight similarity"):
        model_of(video={"max_frames": FRAMES}).score_pairs(text.pooled_BW, clips)


def test_a_still_is_a_clip_of_one_frame() -> None:
    model, stills = model_of(), torch.randn(2, 3, PIXELS, PIXELS)
    text = torch.randn(3, 8)
    alone, clips = model.encode_image(stills), model.encode_image(stills[:, None], torch.ones(2, 1))
    torch.testing.assert_close(model.score_pairs(text, alone), model.score_pairs(text, clips))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^m.video.heads: 4 do not divide the width, 6; give another number"):
        model_of(video=MODEL["video"] | {"heads": 4})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embedding_width": None}, "video: tight reads captions and frames in one width; give embedding_width"),
        ({"bias": -10.0}, "bias: it shifts cosines, and video of kind tight has none; leave it out"),
        ({"video": {"kind": "tight"}}, "layers: tight needs their number; give it"),
        ({"video": {"kind": "sequential", "layers": 2}}, "heads: sequential needs their number; give it"),
        ({"video": {"layers": 4}}, "layers: a mean has none; leave it out, or take sequential or tight"),
        ({"video": {"kind": "mean", "heads": 8}}, "heads: a mean has none; leave it out, or take sequential or tight"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelConfig.model_validate(MODEL | changes)
