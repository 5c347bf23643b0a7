"""The dual encoder: unit vectors, a bounded temperature, the same weights for the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from mmflow.errors import RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.dual import DualEncoder, build_dual_encoder


def build(config: ModelConfig, seed: int = 0) -> DualEncoder:
    return build_dual_encoder("pretrain.model", config, 64, seed)


def inputs(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 16, 16), torch.randint(0, 64, (batch, 7)), torch.ones(batch, 7, dtype=torch.int64)


def test_embeddings_are_of_unit_length_in_one_space(tiny_config: ModelConfig) -> None:
    outputs = build(tiny_config).eval()(*inputs())
    for name in ("image_embedding", "text_embedding"):
        assert outputs[name].shape == (5, 6)
        torch.testing.assert_close(outputs[name].norm(dim=1), torch.ones(5))


def test_both_sides_embed_as_the_whole_does(tiny_config: ModelConfig) -> None:
    model = build(tiny_config).eval()
    pixels, tokens, mask = inputs()
    outputs = model(pixels, tokens, mask)
    torch.testing.assert_close(model.embed_images(pixels), outputs["image_embedding"])
    torch.testing.assert_close(model.embed_captions(tokens, mask), outputs["text_embedding"])


def test_logit_scale_begins_at_the_temperature_and_ends_at_a_hundred(tiny_config: ModelConfig) -> None:
    model = build(tiny_config).eval()
    assert model.logit_scale.shape == (1,)  # ZeRO cannot partition a scalar
    torch.testing.assert_close(model(*inputs())["logit_scale"], torch.tensor([1 / 0.07]))
    for value, expected in ((math.log(99), 99.0), (math.log(101), 100.0), (50.0, 100.0)):
        torch.nn.init.constant_(model.logit_scale, value)
        torch.testing.assert_close(model(*inputs())["logit_scale"], torch.tensor([expected]))


def test_a_seed_gives_the_weights_whatever_was_drawn_before(tiny_config: ModelConfig) -> None:
    first = build(tiny_config, 3).state_dict()
    torch.manual_seed(99)
    expected = torch.randn(4)
    torch.manual_seed(99)
    second = build(tiny_config, 3).state_dict()
    assert torch.equal(torch.randn(4), expected)  # and the program's own random numbers go on undisturbed
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(tiny_config, 4).state_dict()
    assert not torch.equal(first["image_projection.weight"], other["image_projection.weight"])


def test_mistakes_are_named_by_the_recipe_s_key(tiny_config: ModelConfig) -> None:
    wrong = tiny_config.model_copy(update={"text": tiny_config.text.model_copy(update={"type": "berd"})})
    with pytest.raises(RecipeError, match=r"pretrain\.model\.text\.type: transformers has no 'berd'"):
        build(wrong)


def test_a_size_that_follows_from_another_key_cannot_be_set_twice(tiny_config: ModelConfig) -> None:
    fields = tiny_config.model_dump()
    fields["image"]["options"]["image_size"] = 32
    with pytest.raises(ValidationError, match="image_size follows from vocabulary_size and image_pixels"):
        ModelConfig.model_validate(fields)
