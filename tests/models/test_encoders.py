"""Any encoder behind one signature, and a recipe's mistakes named before a step is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmflow.errors import RecipeError
from mmflow.models.encoders import Encoder, build_encoder, parameter_count

RESNET = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
CONVNEXT = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def refusal(model_type: str, options: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        build_encoder("pretrain.model.text", model_type, options, "mean", image_pixels=16, vocabulary_size=64)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_type_is_answered_with_the_nearest() -> None:
    assert refusal("brt", {}) == "pretrain.model.text.type: transformers has no 'brt'; did you mean 'bert'?"
    assert refusal("%%", {}) == "pretrain.model.text.type: transformers has no '%%'"


def test_unknown_option_is_answered_with_the_nearest() -> None:
    assert (
        refusal("bert", {"hiden_size": 8})
        == "pretrain.model.text.options.hiden_size: bert has no such option; did you mean 'hidden_size'?"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str (value: 'wide')"),
        ({"layer_norm_eps": [1]}, "'layer_norm_eps' expected float"),
    ],
)
def test_option_of_a_wrong_value_is_a_mistake_of_the_recipe(options: dict[str, Any], said: str) -> None:
    message = refusal("bert", BERT | options)
    assert message.startswith("pretrain.model.text: bert ")
    assert said in message


def test_type_of_two_towers_has_no_width() -> None:
    assert "clip states neither hidden_size nor hidden_sizes" in refusal("clip", {})


@pytest.mark.parametrize(
    ("model_type", "options", "pooling", "width", "regions"),
    [
        ("resnet", RESNET, "pooler", 12, 4),  # 16 pixels, halved thrice
        ("resnet", RESNET, "mean", 12, 4),
        ("convnext", CONVNEXT, "pooler", 12, 4),
        ("vit", VIT, "first", 8, 5),  # four patches and the class token
        ("vit", VIT, "pooler", 8, 5),
        ("vit", VIT, "mean", 8, 5),
    ],
)
def test_shapes_of_image_encoders(
    model_type: str, options: dict[str, Any], pooling: str, width: int, regions: int
) -> None:
    encoder = build_encoder("image", model_type, options, pooling, image_pixels=16).eval()
    encoded = encoder(torch.randn(3, 3, 16, 16))
    assert encoder.width == width
    assert encoded.pooled_BW.shape == (3, width)
    assert encoded.sequence_BTW.shape == (3, regions, width)


@pytest.mark.parametrize("pooling", ["mean", "first", "pooler"])
def test_shapes_of_text_encoders(pooling: str) -> None:
    encoder = build_encoder("text", "bert", BERT, pooling, vocabulary_size=64).eval()
    encoded = encoder(torch.randint(0, 64, (3, 7)), torch.ones(3, 7, dtype=torch.int64))
    assert (encoded.sequence_BTW.shape, encoded.pooled_BW.shape) == ((3, 7, 8), (3, 8))


def test_sizes_follow_from_the_recipe() -> None:
    text = build_encoder("text", "bert", BERT, "mean", vocabulary_size=77)
    assert text.backbone.get_input_embeddings().weight.shape == (77, 8)
    image = build_encoder("image", "vit", VIT, "mean", image_pixels=32)
    assert image.backbone.config.image_size == 32


def test_poolings_are_what_they_say() -> None:
    tokens, mask = torch.randint(0, 64, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    encoder = build_encoder("text", "bert", BERT, "mean", vocabulary_size=64).eval()
    encoded = encoder(tokens, mask)
    torch.testing.assert_close(encoded.pooled_BW, encoded.sequence_BTW.mean(1))
    encoder.pooling = "first"
    torch.testing.assert_close(encoder(tokens, mask).pooled_BW, encoded.sequence_BTW[:, 0])


@pytest.mark.parametrize("pooling", ["mean", "first", "pooler"])
def test_padding_changes_nothing(pooling: str) -> None:
    torch.manual_seed(1)
    encoder = build_encoder("text", "bert", BERT, pooling, vocabulary_size=64).eval()
    tokens = torch.randint(5, 64, (2, 5))
    padded = torch.cat([tokens, torch.randint(0, 64, (2, 4))], dim=1)
    mask = torch.cat([torch.ones(2, 5), torch.zeros(2, 4)], dim=1).long()
    plain = encoder(tokens, torch.ones(2, 5, dtype=torch.int64)).pooled_BW
    torch.testing.assert_close(encoder(padded, mask).pooled_BW, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "options"), [("bert", BERT), ("vit", VIT)])
def test_no_parameter_is_without_a_gradient(model_type: str, options: dict[str, Any]) -> None:
    """DeepSpeed reduces and saves every parameter, a pooler that nothing reads among them."""
    encoder: Encoder = build_encoder("x", model_type, options, "mean", image_pixels=16, vocabulary_size=64)
    inputs = (
        (torch.randn(2, 3, 16, 16),)
        if model_type == "vit"
        else (torch.randint(0, 64, (2, 5)), torch.ones(2, 5, dtype=torch.int64))
    )
    encoder(*inputs).pooled_BW.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_parameter_count_counts_scalars() -> None:
    assert parameter_count(torch.nn.Linear(3, 5)) == 20
