"""Attention followed through the layers: by plain loops, by a case whose answer is known, and on real tiny models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmflow.inference.attention import counted, look, of_pooled, rollout, self_relevance
from mmflow.models.config import ModelConfig
from tests.evaluation.models import (
    IMAGE,
    TEXT,
    altered,
    captions_of,
    dual_config,
    matcher_config,
    picture,
    predictor,
    tight_config,
)

HEADS, TOKENS = 3, 5


def maps(layers: int, rows: int = TOKENS, columns: int = TOKENS) -> list[Tensor]:
    return [torch.rand(2, HEADS, rows, columns).softmax(-1) for _ in range(layers)]


def test_rollout_multiplies_the_halved_layers_up() -> None:
    layers = maps(3)
    found = rollout(layers)
    for row in range(2):
        flow = np.eye(TOKENS)
        for layer in layers:
            mean = layer[row].mean(0).double().numpy()
            mixed = np.array([[0.5 * mean[i, j] + 0.5 * (i == j) for j in range(TOKENS)] for i in range(TOKENS)])
            flow = mixed @ flow
        np.testing.assert_allclose(found[row].numpy(), flow, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, TOKENS))


def test_relevance_adds_what_counted_in_each_layer_and_passes_it_on() -> None:
    layers, gradients = maps(2), [torch.randn(2, HEADS, TOKENS, TOKENS) for _ in range(2)]
    found = self_relevance([counted(*each) for each in zip(layers, gradients, strict=True)])
    for row in range(2):
        relevance = np.eye(TOKENS)
        for layer, gradient in zip(layers, gradients, strict=True):
            raised = np.zeros((TOKENS, TOKENS))
            for head in range(HEADS):
                raised += np.maximum(0, (layer[row, head] * gradient[row, head]).double().numpy()) / HEADS
            relevance = relevance + raised @ relevance
        np.testing.assert_allclose(found[row].numpy(), relevance, atol=1e-5)


def test_of_one_layer_that_sums_values_relevance_is_each_ones_part_of_the_score() -> None:
    values = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    (layer,) = maps(1)
    layer = layer[:1, :1].requires_grad_()
    (layer[0, 0, 0] @ values).backward()
    assert layer.grad is not None
    found = of_pooled(self_relevance([counted(layer, layer.grad)]), "first", None)[0]
    expected = (layer[0, 0, 0] * values).clamp(min=0)
    expected[0] = 0  # itself
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("first", [0.0, 1.0, 2.0, 3.0]),
        ("pooler", [0.0, 1.0, 2.0, 3.0]),
        ("last", [8.0, 9.0, 0.0, 11.0]),
        ("end", [12.0, 13.0, 14.0, 0.0]),
        ("mean", [4.0, 10 / 3, 8 / 3, 7.0]),
    ],
)
def test_the_pooled_vectors_row_is_read_over_real_tokens_and_without_itself(
    pooling: str, expected: list[float]
) -> None:
    weights = torch.arange(16.0).view(1, 4, 4)
    mask = torch.tensor([[1, 1, 1, 0]])
    torch.testing.assert_close(of_pooled(weights, pooling, mask)[0], torch.tensor(expected))


def test_a_dual_encoder_of_patches_shows_a_grid_by_gradients_and_by_rollout() -> None:
    loaded = predictor(dual_config("vit"))
    looked = look(loaded, picture("red"), "red circle left")
    assert -1.001 <= looked.score <= 1.001
    for grid in (looked.picture, looked.rollout):
        assert grid is not None
        assert (len(grid), {len(row) for row in grid}) == (2, {2})
        assert max(max(row) for row in grid) == 1.0
        assert min(min(row) for row in grid) >= 0.0
    assert "".join(piece for piece, _ in looked.tokens) == "red circle left"
    assert max(weight for _, weight in looked.tokens) == 1.0


SWIN = {
    "type": "swin",
    "options": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4},
    "pooling": "mean",
}


@pytest.mark.parametrize("image", [IMAGE["resnet"], SWIN])
def test_an_encoder_without_maps_of_the_whole_picture_is_asked_by_its_pixels(image: dict[str, Any]) -> None:
    looked = look(predictor(altered(dual_config(), image=image)), picture("red"), "red circle")
    assert looked.rollout is None
    assert looked.picture is not None
    assert (len(looked.picture), len(looked.picture[0])) == (8, 8)


@pytest.mark.parametrize("kind", ["single_stream", "cross_attention", "co_attention"])
def test_a_model_that_matches_is_asked_through_its_fusion(kind: str) -> None:
    looked = look(predictor(matcher_config(kind)), picture("blue"), "blue square")
    assert looked.picture is not None
    assert len(looked.picture) == 2
    assert max(weight for _, weight in looked.tokens) == 1.0


def test_words_of_a_caption_weigh_by_what_raised_a_pair_s_score() -> None:
    looked = look(predictor(tight_config()), picture("red"), "a red square")
    assert looked.picture is None  # a clip's regions are frames
    assert max(weight for _, weight in looked.tokens) == 1


def test_gradients_change_with_the_text_and_rollout_does_not() -> None:
    loaded = predictor(dual_config("vit"))
    one, other = (look(loaded, picture("red"), text) for text in captions_of("red")[:2])
    assert one.rollout == other.rollout
    assert one.picture != other.picture


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIGLIP: dict[str, Any] = {
    "image": {"type": "siglip_vision_model", "options": {**SIZES, "patch_size": 8}, "pooling": "pooler"},
    "text": {
        "type": "siglip_text_model",
        "options": {**SIZES, "max_position_embeddings": 12, "projection_size": 16},
        "pooling": "pooler",
    },
}


@pytest.mark.parametrize("config", [dual_config(), matcher_config()])
@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("frozen", [1, "all"])
def test_a_frozen_encoder_is_looked_at_like_another_and_stays_frozen(
    config: ModelConfig, side: str, frozen: int | str
) -> None:
    loaded = predictor(
        altered(config, **{side: (IMAGE["vit"] if side == "image" else TEXT) | {"frozen_layers": frozen}})
    )
    before = [weight.requires_grad for weight in loaded.model.parameters()]
    assert not all(before)
    found, expected = (look(model, picture("red"), "a red square") for model in (loaded, predictor(config)))
    assert found == expected
    assert [weight.requires_grad for weight in loaded.model.parameters()] == before


@pytest.mark.parametrize("config", [dual_config(), matcher_config()])
def test_words_of_a_document_weigh_what_their_window_does(config: ModelConfig) -> None:
    loaded = predictor(altered(config, text=TEXT | {"windows": {"tokens": 8, "layers": 1, "heads": 2}}, max_tokens=32))
    text = "square in red square in green the blue one on the left of it all"  # windows of seven words
    weights = [weight for _, weight in look(loaded, picture("red"), text).tokens]
    assert len(weights) == 15
    assert [len(set(weights[at : at + 7])) for at in (0, 7, 14)] == [1, 1, 1]
    assert max(weights) == 1.0
    assert len(set(weights)) > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"image": IMAGE["vit"] | {"pooling": "attention"}, "text": TEXT | {"pooling": "attention"}},
        SIGLIP,
    ],
)
def test_what_a_learned_query_or_siglip_s_pooler_reads_is_shown(changes: dict[str, Any]) -> None:
    loaded = predictor(altered(dual_config(), **changes))
    looked = look(loaded, picture("red"), "a red square on the left")
    weights = [weight for _, weight in looked.tokens]
    assert max(weights) == 1.0
    assert len(set(weights)) > 1
    assert looked.picture is not None
    assert len({weight for row in looked.picture for weight in row}) > 1


def test_a_learned_query_reads_what_its_weights_say_through_the_layers() -> None:
    """The rollout of a pooled vector is the query's mean map times that of the layers, written out."""
    loaded = predictor(altered(dual_config(), image=IMAGE["vit"] | {"pooling": "attention"}))
    pixels, _ = loaded.image_inputs([picture("red")])
    encoded = loaded.model.encode_image(pixels, attentions=True)
    assert encoded.pooling_BH1T is not None
    assert encoded.attentions is not None
    read = (encoded.pooling_BH1T.mean(1) @ rollout(encoded.attentions))[0, 0, 1:].detach().view(2, 2)
    found = look(loaded, picture("red"), "a red square").rollout
    torch.testing.assert_close(torch.tensor(found), read / read.max(), atol=1e-3, rtol=1e-3)


def test_the_pooler_of_siglip_gives_the_same_vector_where_its_map_is_asked_for() -> None:
    loaded = predictor(altered(dual_config(), **SIGLIP))
    pixels, _ = loaded.image_inputs([picture("red"), picture("blue")])
    plain, mapped = (loaded.model.encode_image(pixels, attentions=asked) for asked in (False, True))
    torch.testing.assert_close(mapped.pooled_BW, plain.pooled_BW, atol=1e-5, rtol=1e-5)
    assert mapped.pooling_BH1T is not None
    torch.testing.assert_close(mapped.pooling_BH1T.sum(-1), torch.ones(2, 2, 1))
