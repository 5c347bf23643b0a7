"""What a model is trained to do and how much of each: a section an objective, there because the recipe names it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mmflow.core.config import Config


class ObjectiveConfig(Config):
    """What every objective has."""

    weight: float | list[tuple[int, float]] = 1.0
    """What its loss is multiplied by: a number, or a list of [step, weight] with straight lines between them, level
    before the first and after the last."""

    @model_validator(mode="after")
    def _weight_is_one(self) -> ObjectiveConfig:
        points = self.weight if isinstance(self.weight, list) else [(0, self.weight)]
        steps = [step for step, _ in points]
        if not points or sorted(set(steps)) != steps:
            raise ValueError(f"weight: {self.weight} is no list of [step, weight] whose steps rise; give such a list")
        if any(weight < 0 for _, weight in points):
            raise ValueError(f"weight: {self.weight} is below 0; leave the objective out or give it 0")
        return self

    def weight_at(self, step: int) -> float:
        """The weight at a step."""
        if not isinstance(self.weight, list):
            return self.weight
        (before, weight), *later = self.weight
        for after, next_weight in later:
            if step < after:
                return weight + (next_weight - weight) * max(0, step - before) / (after - before)
            before, weight = after, next_weight
        return weight


class ContrastiveConfig(ObjectiveConfig):
    """InfoNCE over the global batch; on clips the video–text contrast."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over all candidates."""


class SigmoidConfig(ObjectiveConfig):
    """SigLIP's loss: every pair of the global batch judged on its own. It wants a model with a `bias`."""


class MatchingConfig(ObjectiveConfig):
    """Does this caption belong to this picture? Each pair, and for each side of it one wrong partner."""

    negatives: Literal["hard", "uniform"] = "hard"
    """How wrong partners are drawn: the more alike the likelier (ALBEF), which needs embeddings, or each as likely.
    From scratch take uniform: a head begins to tell 256 pairs apart after 50 steps by it, and after 110 by hard."""
    pool: Literal["batch", "rank"] = "batch"
    """From where: the whole global batch, for which every rank's sequences are gathered, the same whatever the number
    of ranks; or this rank's part of it, which moves nothing."""


class MaskedLanguageConfig(ObjectiveConfig):
    """Words hidden, to be guessed from the rest and, with a fusion, from the picture."""

    share: float = Field(0.15, gt=0, lt=1)
    """Of the words, how many must be guessed."""


class MaskedImageConfig(ObjectiveConfig):
    """Squares of the picture hidden, to be painted from the rest and, with a fusion, from the caption."""

    share: float = Field(0.6, gt=0, lt=1)
    """Of the squares, how many are hidden."""
    square_pixels: int = Field(32, ge=1)
    """Side of a square; SimMIM found 32 best for pictures of 192 and 224 pixels."""


class CaptioningConfig(ObjectiveConfig):
    """The caption, a word at a time, from the picture and the words before it."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over the vocabulary."""


class AnsweringConfig(ObjectiveConfig):
    """The answer to a question about the picture."""

    by: Literal["classes", "generation"] = "classes"
    """Choose among the known answers, or write the answer word by word."""
    targets: Literal["index", "scores"] = "index"
    """For classes: the one right answer, or the score that each answer earns from the people who were asked."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over all answers, or over the vocabulary; not for scores, which are soft already."""

    @model_validator(mode="after")
    def _scores_are_of_classes(self) -> AnsweringConfig:
        if self.targets == "scores" and (self.by == "generation" or self.label_smoothing):
            raise ValueError("targets: scores goes with by: classes and no label_smoothing; take index, or drop those")
        return self


class ClassificationConfig(ObjectiveConfig):
    """The label of the picture, or with a fusion of the pair."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over all classes."""


class ObjectivesConfig(Config):
    """The objectives of a training; contrastive where none is named. The loss is their weighted sum."""

    contrastive: ContrastiveConfig | None = None
    sigmoid: SigmoidConfig | None = None
    matching: MatchingConfig | None = None
    masked_language: MaskedLanguageConfig | None = None
    masked_image: MaskedImageConfig | None = None
    captioning: CaptioningConfig | None = None
    answering: AnsweringConfig | None = None
    classification: ClassificationConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _contrastive_unless_named(cls, fields: Any) -> Any:
        return {"contrastive": {}} if fields == {} else fields

    @model_validator(mode="after")
    def _names_one(self) -> ObjectivesConfig:
        if not self.named:
            raise ValueError("every objective is null; name one, such as contrastive: {}")
        return self

    @property
    def named(self) -> dict[str, ObjectiveConfig]:
        """The objectives that the recipe names, in the order in which they are computed."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in sections.items() if section is not None}
