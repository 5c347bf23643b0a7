"""What of an examination a model can be asked: told by what it is made of, before any training, and again by what a
package holds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from mmflow.core.errors import RecipeError
from mmflow.evaluation.config import EvaluateConfig
from mmflow.training.config import DistillConfig, PretrainConfig, tasks_of

Gives = frozenset[str]  # ModelConfig's `gives`

# What each section of the recipe needs of a model, one or the other, beside retrieval, which needs similarities.
NEEDS: dict[str, tuple[Gives, ...]] = {
    "zero_shot": (Gives({"embeddings"}),),
    "classification": (Gives({"class_logits"}),),
    "answering": (Gives({"fused", "class_logits"}), Gives({"fused", "decoded from the question"})),
    "captions": (Gives({"decoded from the image"}),),
    "long_text": (Gives({"embeddings"}),),
    "matching": (Gives({"matching_logits"}),),
    "masked_language": (Gives({"masked_language_logits"}),),
}
SIMILARITIES = Gives({"embeddings", "pair_scores"})
COMPARES = SIMILARITIES | {"matching_logits"}

_SHARED_SPACE = "a text encoder and an embedding_width"
_REMEDIES = {
    "zero_shot": _SHARED_SPACE,
    "classification": "the head classes",
    "answering": "a fusion, and the head classes or a decoder with memory: fused",
    "captions": "a decoder with memory: image",
    "long_text": _SHARED_SPACE,
    "matching": "a fusion and the head matching",
    "masked_language": "the head masked_language",
}


def asked_and_given(settings: EvaluateConfig, gives: Gives) -> frozenset[str]:
    """The sections that the recipe asks for and a model that gives this can be examined in."""
    asked = {name for name in NEEDS if getattr(settings, name) is not None}
    found = {name for name in asked if any(needed <= gives for needed in NEEDS[name])}
    return frozenset(found | ({"retrieval"} if SIMILARITIES & gives else set()))


def check_asked(settings: EvaluateConfig, gives: Mapping[str, Gives]) -> None:
    """Raise RecipeError for a section that none of the models (by name) can be examined in, and where nothing is left
    to do."""
    names = " and ".join(gives)
    possible = {name for each in gives.values() for name in asked_and_given(settings, each)}
    for name in NEEDS:
        if getattr(settings, name) is not None and name not in possible:
            raise RecipeError(
                f"evaluate.{name}: {names} cannot be examined in it; it takes {_REMEDIES[name]}: name them, or leave "
                f"{name} out"
            )
    if settings.attention is not None and not any(each & COMPARES for each in gives.values()):
        raise RecipeError(f"evaluate.attention: {names} compares no picture with text; leave attention out")
    if not possible:
        raise RecipeError(
            f"evaluate: nothing to measure of {names} without a shared space; name one of {', '.join(NEEDS)}"
        )


def check_evaluation(settings: EvaluateConfig, trained: Mapping[str, PretrainConfig | DistillConfig]) -> None:
    """Raise RecipeError where the models that a recipe trains (stage → its section) will give nothing that a section
    of `evaluate` reads, or the head `classes` will tell apart other things than the section asks for."""
    check_asked(settings, {f"{stage}.model": section.model.gives for stage, section in trained.items()})
    if settings.captions is not None and find_spec("sacrebleu") is None:
        raise RecipeError(
            "evaluate.captions: BLEU needs sacrebleu, which is not installed: pip install 'mmflow[evaluation]', or "
            "leave captions out"
        )
    if settings.classification is not None:
        label = settings.classification.label
        taught = {
            task.key: task.loader.label
            for stage, section in trained.items()
            if "classes" in section.model.heads
            for task in tasks_of(stage, section)
        }
        if label not in taught.values():
            key, other = next(iter(taught.items()))
            raise RecipeError(
                f"evaluate.classification.label: {label}, and {key}.loader.label is {other or 'not set'}; make them "
                "equal, or leave classification out"
            )
    tasks = [task for stage, section in trained.items() for task in tasks_of(stage, section)]
    if settings.answering is not None and all(task.loader.text != "questions" for task in tasks):
        raise RecipeError(
            f"evaluate.answering: no model here is taught answers; set {tasks[0].key}.loader.text to questions, or "
            "leave answering out"
        )


def reads_captions(settings: EvaluateConfig, gives: Gives) -> bool:
    """Whether an examination of such a model needs captions: of a split of questions there may be none."""
    found = asked_and_given(settings, gives)
    fused_classes = "classification" in found and "fused" in gives  # of a picture with its caption
    return (
        settings.attention is not None
        or fused_classes
        or bool(found & {"retrieval", "captions", "matching", "masked_language"})
    )
