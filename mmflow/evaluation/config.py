"""Stage `evaluate`: its settings, the table of examinations, and what a recipe may ask of its models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field

from mmflow.core.config import OPERATIONAL, Config
from mmflow.core.errors import RecipeError
from mmflow.evaluation.answering import ANSWERING, AnsweringConfig
from mmflow.evaluation.attention import ATTENTION, AttentionConfig
from mmflow.evaluation.captions import CAPTIONS
from mmflow.evaluation.classification import CLASSIFICATION, ZERO_SHOT, ClassificationConfig, ZeroShotConfig
from mmflow.evaluation.examination import Examination, Trained
from mmflow.evaluation.masked_language import MASKED_LANGUAGE, MaskedLanguageConfig
from mmflow.evaluation.retrieval import LONG_TEXT, MATCHING, RETRIEVAL, LongTextConfig, MatchingConfig
from mmflow.evaluation.robustness import ROBUSTNESS, RobustnessConfig
from mmflow.evaluation.slices import SLICES, SlicesConfig
from mmflow.inference.generation import WritingConfig
from mmflow.inference.result import Gives
from mmflow.inference.runner import Pool

EXAMINATIONS: dict[str, Examination] = {
    "retrieval": RETRIEVAL,
    "zero_shot": ZERO_SHOT,
    "classification": CLASSIFICATION,
    "answering": ANSWERING,
    "captions": CAPTIONS,
    "long_text": LONG_TEXT,
    "matching": MATCHING,
    "masked_language": MASKED_LANGUAGE,
    "robustness": ROBUSTNESS,
    "slices": SLICES,
    "attention": ATTENTION,
}
"""By the name of their section in `EvaluateConfig`; retrieval has none, and is done wherever a model can."""


class EvaluateConfig(Pool):
    """Stage `evaluate`: teacher, student and an untrained model on the same held-out rows; retrieval wherever the model
    has a shared space."""

    splits: list[str] = Field(min_length=1)
    """Held-out splits, each reported by its name."""
    languages: list[str] = Field(default_factory=lambda: ["en"], min_length=1)
    """Languages of the captions; the first is the one that headline figures and gates use."""
    zero_shot: ZeroShotConfig | None = None
    classification: ClassificationConfig | None = None
    answering: AnsweringConfig | None = None
    captions: WritingConfig | None = None
    """Captions written by the decoder against people's, and how much theirs surprise it."""
    long_text: LongTextConfig | None = None
    matching: MatchingConfig | None = None
    masked_language: MaskedLanguageConfig | None = None
    robustness: RobustnessConfig | None = None
    slices: SlicesConfig | None = None
    attention: AttentionConfig | None = None
    batch_size: Annotated[int, OPERATIONAL] = Field(256, ge=1)
    """Rows computed at a time."""
    max_errors: Annotated[float, OPERATIONAL] = Field(0.01, ge=0, le=1)
    """Largest share of rows that may fail, such as undecodable pictures. They are left out, for all models."""

    @property
    def named(self) -> dict[str, Config]:
        """The sections that the recipe names."""
        sections = {name: getattr(self, name, None) for name in EXAMINATIONS}
        return {name: section for name, section in sections.items() if section is not None}


def possible(settings: EvaluateConfig, gives: Gives) -> list[str]:
    """The examinations that the recipe asks for and that fit a model which gives this."""
    asked = {"retrieval", *settings.named}
    return [name for name, examination in EXAMINATIONS.items() if name in asked and examination.fits(gives)]


def check_possible(settings: EvaluateConfig, gives: Mapping[str, Gives]) -> None:
    """Raise RecipeError for a section that fits none of the models (by name), and where nothing can be measured."""
    models = " and ".join(gives)
    fitting = {name for model in gives.values() for name in possible(settings, model)}
    for name in settings.named:
        if name not in fitting:
            raise RecipeError(
                f"evaluate.{name}: {models} cannot be examined in it; it needs {EXAMINATIONS[name].remedy}: add them, "
                f"or remove {name}"
            )
    if not any(EXAMINATIONS[name].measures for name in fitting):
        sections = ", ".join(name for name, examination in EXAMINATIONS.items() if examination.measures)
        raise RecipeError(
            f"evaluate: without a shared embedding space there is nothing to measure of {models}; add one of "
            f"{sections.removeprefix('retrieval, ')}"
        )


def check_evaluation(settings: EvaluateConfig, trained: Trained) -> None:
    """Raise RecipeError where the models that a recipe trains cannot be examined as it asks."""
    check_possible(settings, {f"{stage}.model": section.model.gives for stage, section in trained.items()})
    for name, section in settings.named.items():
        EXAMINATIONS[name].check(section, trained)


def reads_captions(settings: EvaluateConfig, models: Iterable[Gives]) -> bool:
    """Whether any of the models is examined by captions: a split of questions may have none."""
    needed = [(EXAMINATIONS[name].reads_captions, gives) for gives in models for name in possible(settings, gives)]
    return any(captions is not None and captions <= gives for captions, gives in needed)
