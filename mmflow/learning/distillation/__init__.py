"""The table of distillation losses, the teachers that each of them uses, and the settings of teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mmflow.core.config import Config
from mmflow.core.errors import RecipeError
from mmflow.learning import named_losses, weighted_sum
from mmflow.learning.distillation.attention import Attention
from mmflow.learning.distillation.features import Features
from mmflow.learning.distillation.hidden import Hidden
from mmflow.learning.distillation.interactive import Interactive
from mmflow.learning.distillation.loss import DistillationBatch, DistillationLoss, ModelTraits
from mmflow.learning.distillation.ranking import Ranking
from mmflow.learning.distillation.similarities import Similarities
from mmflow.learning.distillation.soft_labels import SoftLabels
from mmflow.models.config import VOCABULARY_SIZE, ModelConfig, PackageConfig

if TYPE_CHECKING:
    from torch import Tensor


class DistillationLossesConfig(Config):
    """What the student learns from its teachers, besides its objectives; soft labels and features if none is named."""

    soft_labels: SoftLabels | None = None
    similarities: Similarities | None = None
    features: Features | None = None
    interactive: Interactive | None = None
    attention: Attention | None = None
    hidden: Hidden | None = None
    ranking: Ranking | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        if fields and all(value is None for value in fields.values()):
            raise ValueError("every loss is null; name one, such as soft_labels: 1")
        numbers = {name: {"weight": value} for name, value in fields.items() if isinstance(value, int | float)}
        return {**fields, **numbers} or {"soft_labels": {}, "features": {}}

    @property
    def named(self) -> dict[str, DistillationLoss]:
        """The losses that the recipe names, in the order of computation."""
        return named_losses(self)


class TeacherConfig(PackageConfig):
    """A teacher besides the one that `pretrain` trained, which has weight 1."""

    weight: float = Field(1.0, gt=0)
    """How much it counts beside the other teachers."""


class CacheConfig(Config):
    """The teachers' embeddings of stored augmentations, computed once and read from disk in every epoch."""

    augmentations: int = Field(4, ge=1)
    """Views of each sample that are stored; epoch e shows view e modulo this."""
    precision: Literal["fp16", "bf16"] = "fp16"
    """Of the stored numbers."""


class InitialiseConfig(Config):
    """Weights of the first teacher that the student begins with, wherever both have a part of the same kind (Weight
    Selection, arXiv 2311.18823)."""

    layers: Literal["first", "last", "even"] = "even"
    """Which layers of a deeper teacher: the first, the last, or evenly spaced from first to last."""
    width: Literal["first", "even"] = "first"
    """Which units of a wider teacher: the first, which keeps attention heads whole, or evenly spaced ones."""


def teachers_by_loss(
    key: str, losses: DistillationLossesConfig, student: ModelTraits, teachers: Sequence[ModelTraits]
) -> dict[str, list[int]]:
    """For each loss the numbers of the teachers that can teach it.

    Raises RecipeError if there are none. `key` is the recipe's section.
    """
    numbers = {}
    for name, loss in losses.named.items():
        reasons = [loss.missing(student, teacher) for teacher in teachers]
        numbers[name] = [number for number, reason in enumerate(reasons) if reason is None]
        if not numbers[name]:
            raise RecipeError(f"{key}.losses.{name}: {reasons[0]}, or leave {name} out")
    return numbers


def distillation_total(
    losses: Mapping[str, DistillationLoss], batches: Mapping[str, DistillationBatch], step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the distillation losses at a step, (), and each loss before its weight, by name."""
    values = {name: loss.loss(batches[name]) for name, loss in losses.items()}
    return weighted_sum(losses, values, step), values


def check_losses(
    key: str, losses: DistillationLossesConfig, student: ModelConfig, teachers: Sequence[ModelConfig]
) -> None:
    """Raise RecipeError naming a loss that the student cannot learn or no teacher can teach. `key` is the recipe's.

    The models are built without weights. The weights of an encoder from a checkpoint would be read, so then the check
    happens only when the student is built.
    """
    configs = (student, *teachers)
    encoders = [encoder for config in configs for encoder in (config.image, config.text) if encoder is not None]
    if any(encoder.checkpoint is not None for encoder in encoders):
        return
    import torch

    from mmflow.models.model import build

    traits = []
    for config in configs:
        with torch.device("meta"):
            model = build(f"{key}.model", config, config.vocabulary_size or VOCABULARY_SIZE, seed=0, num_classes=2)
        traits.append(ModelTraits(model.gives, model, config.image_pixels))
    teachers_by_loss(key, losses, traits[0], traits[1:])
