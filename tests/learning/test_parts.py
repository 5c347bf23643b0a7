"""A part that nothing trains is named before it is packaged as it was drawn."""

from __future__ import annotations

from typing import Any

import pytest

from mmflow.core.errors import RecipeError
from mmflow.learning.objectives import ObjectivesConfig, check_trained
from mmflow.models.config import ModelConfig
from tests.learning.test_on_a_model import EVERYTHING, MODEL

DECODER = MODEL["decoder"]


def trained(objectives: dict[str, Any], taught: tuple[str, ...] = (), **changes: Any) -> None:
    config = ModelConfig.model_validate(MODEL | {"heads": [], "decoder": None, "bias": None, "fusion": None} | changes)
    check_trained("pretrain", config, [ObjectivesConfig.model_validate(objectives)], taught)


@pytest.mark.parametrize(
    ("objectives", "changes", "said"),
    [
        (
            {"captioning": {}},
            {"decoder": DECODER},
            "model.embedding_width: no objective trains it; name contrastive or sigmoid under pretrain.objectives, or "
            "set it to null",
        ),
        (
            {"contrastive": {}},
            {"bias": -10.0},
            "model.bias: no objective trains it; name sigmoid under pretrain.objectives, or leave it out",
        ),
        (
            {"contrastive": {}},
            {"decoder": DECODER},
            "model.decoder: no objective trains it; name captioning or answering with by: generation under "
            "pretrain.objectives, or leave it out",
        ),
        (
            {"contrastive": {}, "matching": {}},
            {"fusion": MODEL["fusion"], "heads": ["matching", "masked_language"]},
            "model.heads: masked_language: no objective trains it; name masked_language under pretrain.objectives, or "
            "leave it out",
        ),
        (
            {"answering": {"by": "generation"}},
            {"fusion": MODEL["fusion"], "heads": ["classes"], "decoder": DECODER, "embedding_width": None},
            "model.heads: classes: no objective trains it; name answering with by: classes or classification under "
            "pretrain.objectives, or leave it out",
        ),
    ],
)
def test_an_untrained_part_is_named_with_what_trains_it(
    objectives: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        trained(objectives, **changes)
    assert str(caught.value) == f"pretrain.{said}"


def test_what_is_trained_passes() -> None:
    trained({"contrastive": {}})
    trained({"sigmoid": {}}, bias=-10.0)
    trained(EVERYTHING, **MODEL)
    trained({"masked_language": {}}, taught=("embedding_width",), heads=["masked_language"])
