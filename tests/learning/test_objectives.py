"""Weights by step, which objectives fit which model, and the order of module calls, which no batch changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmflow.core.errors import RecipeError
from mmflow.learning.objectives import ObjectivesConfig, check_objectives, check_trained, total
from mmflow.learning.objectives.contrastive import Contrastive
from mmflow.learning.outputs import MaskingTokens
from mmflow.models.config import ModelConfig
from tests.learning.test_on_a_model import EVERYTHING as ALL_OF_A_MODEL
from tests.learning.test_on_a_model import MODEL
from tests.learning.tiny import SPECIAL, TinyModel, all_real, batch, outputs_of, rows_of

EVERYTHING = {name: {} for name in ObjectivesConfig.model_fields}


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 2.0), (10, 2.0), (15, 1.5), (20, 1.0), (25, 0.5), (30, 0.0), (10**9, 0.0)]
)
def test_weights_change_in_straight_lines_between_steps(step: int, weight: float) -> None:
    config = Contrastive.model_validate({"weight": [[10, 2], [20, 1.0], [30, 0]]})
    assert config.weight_at(step) == pytest.approx(weight)


@given(st.integers(0, 10**6), st.floats(0, 1e6))
def test_a_number_is_the_weight_of_every_step(step: int, weight: float) -> None:
    assert Contrastive(weight=weight).weight_at(step) == weight


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1, "not be negative"),
        ([[0, 1], [5, -2]], "not be negative"),
        ([[5, 1], [5, 2]], "increasing steps"),
        ([[5, 1], [0, 2]], "increasing steps"),
        ([], "increasing steps"),
    ],
)
def test_invalid_weights_are_refused(weight: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Contrastive.model_validate({"weight": weight})


def test_an_empty_section_means_contrastive() -> None:
    assert list(ObjectivesConfig().named) == ["contrastive"]
    assert list(ObjectivesConfig.model_validate({"captioning": {}}).named) == ["captioning"]
    again = ObjectivesConfig.model_validate(ObjectivesConfig(captioning={"weight": [(0, 1.0)]}).model_dump(mode="json"))  # type: ignore[arg-type]
    assert list(again.named) == ["captioning"]
    with pytest.raises(ValidationError, match="name one"):
        ObjectivesConfig.model_validate({"contrastive": None})


def test_the_loss_is_the_weighted_sum_of_the_parts() -> None:
    model, arguments = TinyModel(), batch(6)
    weights = {name: 0.5 + number for number, name in enumerate(ObjectivesConfig.model_fields)}
    config = ObjectivesConfig.model_validate(
        {name: {"weight": [[0, 0.0], [10, weight]]} for name, weight in weights.items()}
    )
    loss, parts = total(outputs_of(model, arguments, all_real(6)), config.named, step=5)
    assert list(parts) == list(ObjectivesConfig.model_fields)
    assert all(part > 0 for part in parts.values())
    torch.testing.assert_close(loss, sum(0.5 * weights[name] * part for name, part in parts.items()))


def test_each_output_of_the_model_is_computed_once() -> None:
    calls: list[str] = []

    class Counting(TinyModel):
        def __getattribute__(self, name: str) -> Any:
            if name in ("embed_image", "embed_text", "scale"):
                calls.append(name)
            return super().__getattribute__(name)

    model, arguments = Counting(), batch(6)
    total(outputs_of(model, arguments, all_real(6)), ObjectivesConfig.model_validate(EVERYTHING).named, step=0)
    assert sorted(calls) == ["embed_image", "embed_text", "scale"]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_modules_are_called_in_one_order_for_any_batch_and_weights(weight: float) -> None:
    """ZeRO-3 gathers in that order: a rank of padding, a text without words to hide, rows without negatives."""

    def calls(real: torch.Tensor, share: float, keys: tuple[str, ...], weight: float) -> list[str]:
        model, arguments = TinyModel(), batch(6)
        seen: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
        sections = {name: {"weight": weight} for name in ObjectivesConfig.model_fields} | {
            "masked_language": {"share": share}
        }
        config = ObjectivesConfig.model_validate(sections)
        loss, _ = total(outputs_of(model, arguments | {"keys": keys}, rows_of(real)), config.named, step=0)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(parameter.grad is not None for parameter in model.parameters())
        return seen

    usual = calls(torch.ones(6, dtype=torch.bool), 0.5, tuple("abcdef"), 1.0)
    assert calls(torch.zeros(6, dtype=torch.bool), 1e-9, ("same",) * 6, weight) == usual


def test_the_same_generator_gives_the_same_loss_and_another_not() -> None:
    model, arguments = TinyModel(), batch(8)
    config = ObjectivesConfig.model_validate(
        {"matching": {}, "masked_language": {}, "masked_image": {"square_pixels": 4}}
    )
    losses = [
        total(outputs_of(model, arguments, all_real(8), seed=seed), config.named, step=0)[0] for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


ALL = {
    *("embeddings", "bias", "fused", "matching_logits", "masked_language_logits", "masked_image_pixels"),
    *("class_logits", "decoded", "decoded from the image"),
}


@pytest.mark.parametrize(
    ("objectives", "gives", "message"),
    [
        ({"contrastive": {}}, {"fused"}, "recipe.contrastive: needs embeddings or pair_scores; give the model"),
        ({"sigmoid": {}}, {"embeddings"}, "recipe.sigmoid: needs bias; give the model a bias"),
        ({"matching": {}}, {"embeddings"}, "recipe.matching: needs fused; give the model a fusion"),
        ({"matching": {}}, {"fused", "embeddings"}, "recipe.matching: needs matching_logits; add matching"),
        ({"matching": {}}, {"fused", "matching_logits"}, "recipe.matching: needs embeddings"),
        ({"masked_language": {}}, {"fused"}, "recipe.masked_language: needs masked_language_logits"),
        ({"masked_image": {}}, set(), "recipe.masked_image: needs masked_image_pixels"),
        ({"captioning": {}}, set(), "recipe.captioning: needs decoded; give the model a decoder"),
        ({"captioning": {}}, {"decoded", "decoded from the question"}, "set the model's decoder.memory to image"),
        ({"answering": {}}, {"fused"}, "recipe.answering: needs class_logits; add classes"),
        ({"answering": {"by": "generation"}}, {"fused", "decoded"}, "decoder.memory to fused"),
        ({"classification": {}}, set(), "recipe.classification: needs class_logits; add classes"),
    ],
)
def test_a_missing_output_is_named_with_the_key_and_the_remedy(
    objectives: dict[str, Any], gives: set[str], message: str
) -> None:
    config = ObjectivesConfig.model_validate(objectives)
    with pytest.raises(RecipeError, match=message) as caught:
        check_objectives("recipe", config, gives, SPECIAL)
    assert "\n" not in str(caught.value)
    assert f"or leave {next(iter(objectives))} out" in str(caught.value)


def test_a_tokenizer_without_a_mask_cannot_hide_words() -> None:
    config = ObjectivesConfig.model_validate({"masked_language": {}})
    bare = MaskingTokens(mask=None, ids=(), vocabulary_size=5)
    with pytest.raises(RecipeError, match=r"recipe.masked_language: .*\[MASK\] or <mask>"):
        check_objectives("recipe", config, ALL, bare)


def test_objectives_that_fit_the_model_pass() -> None:
    config = ObjectivesConfig.model_validate(EVERYTHING)
    check_objectives("recipe", config, ALL, SPECIAL)
    uniform = ObjectivesConfig.model_validate({"matching": {"negatives": "uniform"}})
    check_objectives("recipe", uniform, {"fused", "matching_logits"}, SPECIAL)
    written = ObjectivesConfig.model_validate({"answering": {"by": "generation"}})
    check_objectives("recipe", written, {"fused", "decoded", "decoded from the question"}, SPECIAL)


# --- parts of the model that nothing trains ---------------------------------------------------------------------------

DECODER = MODEL["decoder"]


def trained(objectives: dict[str, Any], by_losses: tuple[str, ...] = (), **changes: Any) -> None:
    config = ModelConfig.model_validate(MODEL | {"heads": [], "decoder": None, "bias": None, "fusion": None} | changes)
    check_trained("pretrain", config, [ObjectivesConfig.model_validate(objectives)], by_losses)


@pytest.mark.parametrize(
    ("objectives", "changes", "message"),
    [
        (
            {"captioning": {}},
            {"decoder": DECODER},
            "model.embedding_width: .* contrastive or sigmoid .* null",
        ),
        ({"contrastive": {}}, {"bias": -10.0}, "model.bias: .* sigmoid .* leave it out"),
        ({"contrastive": {}}, {"decoder": DECODER}, "model.decoder: .* captioning or answering with by: generation"),
        (
            {"contrastive": {}, "matching": {}},
            {"fusion": MODEL["fusion"], "heads": ["matching", "masked_language"]},
            "model.heads: masked_language: .* leave it out",
        ),
        (
            {"answering": {"by": "generation"}},
            {"fusion": MODEL["fusion"], "heads": ["classes"], "decoder": DECODER, "embedding_width": None},
            "model.heads: classes: .* answering with by: classes or classification",
        ),
    ],
)
def test_an_untrained_part_is_named_with_what_trains_it(
    objectives: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^pretrain\.{message}"):
        trained(objectives, **changes)


def test_models_with_only_trained_parts_pass() -> None:
    trained({"contrastive": {}})
    trained({"sigmoid": {}}, bias=-10.0)
    trained(ALL_OF_A_MODEL, **MODEL)
    trained({"masked_language": {}}, by_losses=("embedding_width",), heads=["masked_language"])
