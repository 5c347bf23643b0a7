"""The table of objectives, what a recipe's objectives need of the model, and their weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, get_args

from pydantic import model_validator

from mmflow.core.config import Config
from mmflow.core.errors import RecipeError
from mmflow.learning import MASK_TOKEN, Objective, named_losses, weighted_sum
from mmflow.learning.objectives.answering import Answering
from mmflow.learning.objectives.captioning import Captioning
from mmflow.learning.objectives.classification import Classification
from mmflow.learning.objectives.contrastive import Contrastive
from mmflow.learning.objectives.masked_image import MaskedImage
from mmflow.learning.objectives.masked_language import MaskedLanguage
from mmflow.learning.objectives.matching import Matching
from mmflow.learning.objectives.sigmoid import Sigmoid
from mmflow.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import MaskingTokens, Outputs


class ObjectivesConfig(Config):
    """The objectives of a training, contrastive if none is named. Its loss is their weighted sum."""

    contrastive: Contrastive | None = None
    sigmoid: Sigmoid | None = None
    matching: Matching | None = None
    masked_language: MaskedLanguage | None = None
    masked_image: MaskedImage | None = None
    captioning: Captioning | None = None
    answering: Answering | None = None
    classification: Classification | None = None

    @model_validator(mode="before")
    @classmethod
    def _default(cls, fields: Any) -> Any:
        return {"contrastive": {}} if fields == {} else fields

    @model_validator(mode="after")
    def _check_named(self) -> ObjectivesConfig:
        if not self.named:
            raise ValueError("every objective is null; name one, such as contrastive: {}")
        return self

    @property
    def named(self) -> dict[str, Objective]:
        """The objectives that the recipe names, in the order of computation."""
        return named_losses(self)


def total(outputs: Outputs, objectives: Mapping[str, Objective], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to descend at a step, (), and the loss of each objective before its weight, by name.

    Objectives of weight 0 are computed too: ZeRO-3 waits forever for a module that some steps leave out.
    """
    losses = {name: objective.loss(outputs) for name, objective in objectives.items()}
    return weighted_sum(objectives, losses, step), losses


def check_objectives(key: str, objectives: ObjectivesConfig, gives: Set[str], special: MaskingTokens) -> None:
    """Raise RecipeError where an objective reads what the model or the tokenizer does not give.

    `key` is the recipe's, for the message; `gives` is the model's.
    """
    given = {*gives, MASK_TOKEN} if special.mask is not None else gives
    for name, objective in objectives.named.items():
        for need, remedy in objective.needs().items():
            if given.isdisjoint(need.split(" or ")):
                raise RecipeError(f"{key}.{name}: needs {need}; {remedy}, or leave {name} out")


def check_trained(
    key: str, config: ModelConfig, tasks: Sequence[ObjectivesConfig], trained: Collection[str] = ()
) -> None:
    """Raise RecipeError naming a part of the model that no objective trains: it would be packaged as initialised.

    `key` is the recipe's section; `trained` are parts that distillation losses train.
    """
    trained = {*trained}
    for objective in (objective for objectives in tasks for objective in objectives.named.values()):
        trained |= {part for part, settings in objective.TRAINS.items() if _has(objective, settings)}
    optional = {"embedding_width": config.embedding_width, "bias": config.bias, "decoder": config.decoder}
    parts = {name: f"{key}.model.{name}" for name, value in optional.items() if value is not None}
    parts |= {head: f"{key}.model.heads: {head}" for head in config.heads}
    for part, place in parts.items():
        if part not in trained:
            remedy = "set it to null" if part == "embedding_width" else "leave it out"
            raise RecipeError(
                f"{place}: no objective trains it; name {' or '.join(_trainers(part))} under {key}.objectives, or "
                f"{remedy}"
            )


def _has(objective: Objective, settings: Mapping[str, Any]) -> bool:
    return all(getattr(objective, name) == value for name, value in settings.items())


def _trainers(part: str) -> list[str]:
    """The objectives that train a part, with the settings under which they do."""
    trainers = []
    for name, field in ObjectivesConfig.model_fields.items():
        objective: type[Objective] = get_args(field.annotation)[0]
        if part in objective.TRAINS:
            settings = "".join(f" with {setting}: {value}" for setting, value in objective.TRAINS[part].items())
            trainers.append(name + settings)
    return trainers
