"""Layer-wise learning rates: each layer a factor slower than the one above it, and nothing forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmflow.core.errors import RecipeError
from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig
from mmflow.models.encoders import TextTower
from mmflow.models.model import build_image_encoder, build_text_encoder, learning_rate_factors
from mmflow.models.video import ImageTower
from tests.models.backbones import IMAGE, TEXT


def tower(model_type: str, **settings: Any) -> ImageTower | TextTower:
    if model_type in IMAGE:
        return build_image_encoder(
            "m.image", ImageEncoderConfig(type=model_type, options=IMAGE[model_type], **settings), 16
        )
    return build_text_encoder(
        "m.text", TextEncoderConfig(type=model_type, options=TEXT[model_type], **settings), 64, 12
    )


@pytest.mark.parametrize("model_type", [*IMAGE, *TEXT])
def test_factors_fall_by_layer_from_what_follows_them(model_type: str) -> None:
    model = torch.nn.ModuleDict({"side": tower(model_type, layer_decay=0.5, pooling="attention")})
    factors = learning_rate_factors(model)
    names = {name for name, _ in model.named_parameters()}
    assert factors.keys() <= names
    of_layer: dict[str, set[float]] = {"0": set(), "1": set()}
    for name in names:
        parts = name.split(".")
        if "layer" in parts or "layers" in parts or "stages" in parts:
            place = next(place for place, part in enumerate(parts) if part in ("layer", "layers", "stages"))
            of_layer[parts[place + 1]].add(factors[name])
        elif any("embed" in part or part == "pre_layrnorm" for part in parts):
            assert factors[name] == 0.125, name
        else:
            assert name not in factors, name
    assert of_layer == {"0": {0.25}, "1": {0.5}}


def test_encoders_without_decay_are_not_named() -> None:
    assert learning_rate_factors(tower("vit")) == {}


def test_the_encoder_of_windows_is_found() -> None:
    fields = {"type": "bert", "options": TEXT["bert"], "layer_decay": 0.5, "windows": {"tokens": 8, "heads": 2}}
    model = build_text_encoder("m.text", TextEncoderConfig.model_validate(fields), 64, 40)
    factors = learning_rate_factors(model)
    assert factors["encoder.backbone.embeddings.word_embeddings.weight"] == 0.125
    assert not any(name.startswith("windows.") for name in factors)


def test_layers_that_are_one_and_the_same_cannot_be_counted() -> None:
    options = {"hidden_size": 8, "embedding_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = TextEncoderConfig(type="albert", options=options, layer_decay=0.5)
    with pytest.raises(RecipeError, match="albert has no list of layers to count; leave it out"):
        learning_rate_factors(build_text_encoder("m.text", config, 64, 12))
    with pytest.raises(
        RecipeError, match=r"^m.text.frozen_layers: albert has no list of layers to count; leave it out"
    ):
        build_text_encoder("m.text", config.model_copy(update={"frozen_layers": 1}), 64, 12)
