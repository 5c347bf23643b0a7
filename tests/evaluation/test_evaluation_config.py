"""A recipe that asks models for what they cannot give is refused by its key: before they train, and once loaded."""

from __future__ import annotations

from typing import Any

import pytest

from mmflow.core.errors import RecipeError
from mmflow.evaluation.config import EvaluateConfig, check_evaluation, check_possible, reads_captions
from mmflow.models.config import ModelConfig
from mmflow.training.config import PretrainConfig
from tests.evaluation.models import answerer_config, captioner_config, classifier_config, dual_config, matcher_config

FUSED_DECODER = {"memory": "fused", "width": 16, "layers": 1, "heads": 2}
MODELS = {
    "dual": dual_config(),
    "matcher": matcher_config(),
    "captioner": captioner_config(),
    "classifier": classifier_config(),
    "fused classifier": answerer_config(heads=["classes"]),
    "answerer": answerer_config(decoder=FUSED_DECODER),
}
SECTIONS: dict[str, Any] = {
    "zero_shot": {"label": "colour", "prompts": {"red": ["red"], "blue": ["blue"]}},
    "classification": {"label": "colour"},
    "answering": {},
    "captions": {},
    "long_text": {},
    "matching": {},
    "masked_language": {},
    "robustness": {},
    "slices": {},
}


def settings(**sections: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"splits": ["held_out"], **sections})


def pretrain(model: ModelConfig, **loader: Any) -> PretrainConfig:
    objectives = {"contrastive": {}}  # what is trained is another check's
    fields = {"model": model.model_dump(), "loader": loader, "objectives": objectives}
    return PretrainConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("section", "model", "remedy"),
    [
        ("captions", "answerer", "a decoder with memory: image"),
        ("captions", "dual", "a decoder with memory: image"),
        ("answering", "captioner", "a fusion, and the head classes or a decoder with memory: fused"),
        ("answering", "classifier", "a fusion, and the head classes or a decoder with memory: fused"),
        ("matching", "dual", "a fusion and the head matching"),
        ("zero_shot", "captioner", "a text encoder and an embedding_width"),
        ("long_text", "matcher", "a text encoder and an embedding_width"),
        ("masked_language", "dual", "the head masked_language"),
        ("robustness", "matcher", "a text encoder and an embedding_width"),
        ("slices", "classifier", "a text encoder and an embedding_width"),
    ],
)
def test_a_section_that_no_model_can_be_examined_in_is_refused_by_its_key(
    section: str, model: str, remedy: str
) -> None:
    asked, trained = settings(**{section: SECTIONS[section]}), {"pretrain": pretrain(MODELS[model], text="questions")}
    with pytest.raises(RecipeError) as caught:
        check_evaluation(asked, trained)
    refusal = f"evaluate.{section}: pretrain.model cannot be examined in it; it needs {remedy}: add them, or remove "
    assert str(caught.value) == f"{refusal}{section}"
    with pytest.raises(RecipeError, match=rf"^evaluate\.{section}: teacher cannot be examined in it"):
        check_possible(asked, {"teacher": MODELS[model].gives})


def test_what_compares_nothing_and_what_measures_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^evaluate\.attention: teacher cannot be examined in it"):
        check_possible(settings(attention={}, captions={}), {"teacher": MODELS["captioner"].gives})
    with pytest.raises(RecipeError, match=r"^evaluate: .* nothing to measure of teacher; add one of"):
        check_possible(settings(), {"teacher": MODELS["captioner"].gives})
    both = {"teacher": MODELS["captioner"].gives, "student": MODELS["dual"].gives}
    check_possible(settings(captions={}, attention={}), both)


def test_classes_are_those_that_the_model_is_taught() -> None:
    asked = settings(classification={"label": "colour"})
    check_evaluation(asked, {"pretrain": pretrain(MODELS["classifier"], label="colour")})
    with pytest.raises(
        RecipeError, match=r"^evaluate\.classification\.label: colour, and pretrain\.loader\.label is s"
    ):
        check_evaluation(asked, {"pretrain": pretrain(MODELS["classifier"], label="shape")})
    with pytest.raises(RecipeError, match=r"pretrain\.loader\.label is not set; make them equal"):
        check_evaluation(asked, {"pretrain": pretrain(MODELS["fused classifier"], text="questions")})
    answering = settings(answering={})
    check_evaluation(answering, {"pretrain": pretrain(MODELS["fused classifier"], text="questions")})
    with pytest.raises(RecipeError, match=r"^evaluate\.answering: .* set pretrain\.loader\.text to questions"):
        check_evaluation(answering, {"pretrain": pretrain(MODELS["fused classifier"], label="colour")})


def test_captions_are_read_where_an_examination_needs_them() -> None:
    asked = settings(**SECTIONS)
    assert {name for name, model in MODELS.items() if reads_captions(asked, [model.gives])} == {
        "dual",
        "matcher",
        "captioner",
        "fused classifier",
    }
    assert not reads_captions(settings(answering={}), [MODELS["answerer"].gives])
    assert reads_captions(settings(answering={}), [MODELS["answerer"].gives, MODELS["dual"].gives])
