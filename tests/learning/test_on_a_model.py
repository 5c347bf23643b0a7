"""The objectives on the model that a recipe builds, rather than on the tests' own small one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmflow.learning.objectives import ObjectivesConfig, check_objectives, total
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model, build
from tests.learning.tiny import CLASSES, SIDE, SPECIAL, TOKENS, VOCABULARY, all_real, batch, outputs_of, rows_of

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODEL: dict[str, Any] = {
    "image": {"type": "vit", "options": {**SMALL, **NO_DROPOUT, "patch_size": 4}, "pooling": "first"},
    "text": {"type": "bert", "options": {**SMALL, **NO_DROPOUT, "max_position_embeddings": TOKENS}},
    "embedding_width": 6,
    "image_pixels": SIDE,
    "max_tokens": TOKENS,
    "bias": -2.0,
    "fusion": {"kind": "both_directions", "width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
    "heads": ["matching", "masked_language", "masked_image", "classes"],
    "decoder": {"width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
}
EVERYTHING = {
    **{name: {} for name in ("contrastive", "sigmoid", "matching", "captioning", "answering", "classification")},
    "masked_language": {"share": 0.5},
    "masked_image": {"square_pixels": 4},
}


def model_of(**changes: Any) -> Model:
    config = ModelConfig.model_validate({**MODEL, "vocabulary_size": 64, **changes})
    return build("pretrain.model", config, VOCABULARY, seed=0, num_classes=CLASSES)


def test_every_objective_teaches_every_weight_and_they_are_learnt_together() -> None:
    model, config = model_of(), ObjectivesConfig.model_validate(EVERYTHING)
    check_objectives("pretrain.objectives", config, model.gives, SPECIAL)
    descent = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(15):
        loss, parts = total(outputs_of(model, batch(6), all_real(6)), config.named, step)
        descent.zero_grad()
        loss.backward()
        unreached = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert not unreached
        descent.step()
        losses.append(parts)
    assert all(losses[-1][name] < losses[0][name] for name in EVERYTHING)


def test_answers_are_written_from_the_fused_question() -> None:
    model = model_of(decoder={**MODEL["decoder"], "memory": "fused"}, heads=[], embedding_width=None, bias=None)
    config = ObjectivesConfig.model_validate({"answering": {"by": "generation"}})
    check_objectives("pretrain.objectives", config, model.gives, SPECIAL)
    arguments = batch(4)
    loss, _ = total(outputs_of(model, arguments, all_real(4)), config.named, step=0)
    other_question = {"token_ids": arguments["token_ids"].roll(1, 0), "token_mask": arguments["token_mask"].roll(1, 0)}
    other, _ = total(outputs_of(model, arguments | other_question, all_real(4)), config.named, step=0)
    assert loss != other
    loss.backward()
    assert all(weight.grad is not None for weight in model.text.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("objective", EVERYTHING)
def test_padded_rows_change_nothing(objective: str) -> None:
    model = model_of()
    config = ObjectivesConfig.model_validate({objective: EVERYTHING[objective]})
    whole, real = batch(6), torch.arange(6) < 4
    garbled = batch(6, seed=9)
    padded = {
        name: torch.cat((value[:4], garbled[name][4:])) for name, value in whole.items() if torch.is_tensor(value)
    }
    padded["targets"] = {
        name: torch.cat((value[:4], garbled["targets"][name][4:])) for name, value in whole["targets"].items()
    }
    padded["keys"] = whole["keys"]
    loss, expected = (
        total(outputs_of(model, arguments, rows_of(real)), config.named, step=0)[0] for arguments in (padded, whole)
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("objective", EVERYTHING)
def test_under_autocast_the_loss_stays_fp32_and_near(objective: str) -> None:
    model = model_of()
    config = ObjectivesConfig.model_validate({objective: EVERYTHING[objective]})
    expected, _ = total(outputs_of(model, batch(6), all_real(6)), config.named, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = total(outputs_of(model, batch(6), all_real(6)), config.named, step=0)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0.02)
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)
