"""What a student learns of its teachers and how much, who they are, what of them is cached, and what it begins with. A
loss is there because the recipe names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmflow.core.config import Config
from mmflow.learning.config import ObjectiveConfig
from mmflow.models.config import PackageConfig


class DistillationLossConfig(ObjectiveConfig):
    """What every loss has: a weight. A distillation loss that is a bare number is one of that weight."""


class SoftLabelsConfig(DistillationLossConfig):
    """Divergence from the teacher's probabilities of each caption for a picture, and the other way round, to the
    student's."""

    temperature: float = Field(1.0, gt=0)
    """Softens both; the loss is scaled by its square, which keeps the gradient's size. At 1 it is CLIP-KD's contrastive
    relational distillation (CRD)."""


class SimilaritiesConfig(DistillationLossConfig):
    """Divergence from what pictures the teacher finds alike, and what captions, to what the student does."""

    temperature: float = Field(0.1, gt=0)
    """The cosines of both are divided by it."""


class FeaturesConfig(DistillationLossConfig):
    """Squared distance between the embeddings of student and teacher, through a projection where widths differ."""

    weight: float | list[tuple[int, float]] = 10.0
    """What its loss is multiplied by: a number, or a list of [step, weight] as objectives have it."""


class InteractiveConfig(DistillationLossConfig):
    """The student's pictures must find their captions among the teacher's, and its captions their pictures (ICL)."""


Pairs = Annotated[list[tuple[int, int]], Field(min_length=1)]
"""[student's, teacher's], each counted from 1."""

Layers = Literal["last", "even"] | Pairs

Side = Literal["image", "text"]


class AttentionConfig(DistillationLossConfig):
    """Divergence from the attention maps of the teacher's encoders to those of the student's."""

    sides: list[Side] = Field(min_length=1)
    """The encoders whose maps are compared."""
    layers: Layers = "last"
    """Which layer of the student learns from which of the teacher: last with last (MiniLM), even (TinyBERT), or pairs
    [student's, teacher's] counted from 1."""
    heads: Literal["mean", "same"] | Pairs = "mean"
    """Which head learns from which: the mean over heads from the mean, each from the one of its number where both have
    as many, or pairs [student's, teacher's] counted from 1."""


class HiddenConfig(DistillationLossConfig):
    """Squared distance between layers' outputs, through a projection where widths differ."""

    sides: list[Side] = Field(min_length=1)
    """The encoders whose layers are compared."""
    layers: Layers = "even"
    """Which layer of the student learns from which of the teacher: last, even (TinyBERT), or pairs [student's,
    teacher's] counted from 1."""


class RankingConfig(DistillationLossConfig):
    """The order in which a fused teacher puts the hardest wrong partners of each picture and caption."""

    negatives: int = Field(4, ge=2)
    """How many are ordered; the teacher reads this many pairs a row and side."""


class DistillationLossesConfig(Config):
    """What the student learns beside its objectives; soft labels and features where none is named."""

    soft_labels: SoftLabelsConfig | None = None
    similarities: SimilaritiesConfig | None = None
    features: FeaturesConfig | None = None
    interactive: InteractiveConfig | None = None
    attention: AttentionConfig | None = None
    hidden: HiddenConfig | None = None
    ranking: RankingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_weights(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        numbers = {name: each for name, each in fields.items() if isinstance(each, int | float)}
        if fields and all(each is None for each in fields.values()):
            raise ValueError("every loss is null; name one, such as soft_labels: 1")
        return {**fields, **{name: {"weight": each} for name, each in numbers.items()}} or {
            "soft_labels": {},
            "features": {},
        }

    @property
    def named(self) -> dict[str, DistillationLossConfig]:
        """The losses that the recipe names, in the order in which they are given."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in sections.items() if section is not None}


class TeacherConfig(PackageConfig):
    """A teacher beside the one that `pretrain` trained, which weighs 1."""

    weight: float = Field(1.0, gt=0)
    """How much its word counts beside the others'."""


class CacheConfig(Config):
    """The teachers' embeddings of stored augmentations, computed once and read from disk at every epoch."""

    augmentations: int = Field(4, ge=1)
    """Views of each sample that are stored; epoch e shows view e modulo this, and the teachers know it."""
    precision: Literal["fp16", "bf16"] = "fp16"
    """How they are stored."""


class InitialiseConfig(Config):
    """Weights of the first teacher that the student begins with, where both have a part of the same kind (Weight
    Selection, arXiv 2311.18823)."""

    layers: Literal["first", "last", "even"] = "even"
    """Which layers of a deeper teacher: the first, the last, or evenly spaced from the first to the last."""
    width: Literal["first", "even"] = "first"
    """Which units of a wider teacher: the first, which keeps heads of attention whole, or evenly spaced ones."""
