"""What is learned: one file for each objective (`objectives/`) and each distillation loss (`distillation/`), and the
modules that compute their sum.

Recipes are read without torch, which takes seconds to import: files that hold settings import it inside the functions
that compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from mmflow.core.config import Config
from mmflow.loading.config import LoaderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs

MASK_TOKEN = "a mask token"


class Loss(Config):
    """One term of the loss that a training descends."""

    weight: float | list[tuple[int, float]] = 1.0
    """Multiplies the loss: a number, or a list of [step, weight] with straight lines between the steps, constant before
    the first and after the last."""

    @model_validator(mode="after")
    def _check_weight(self) -> Loss:
        points = self.weight if isinstance(self.weight, list) else [(0, self.weight)]
        steps = [step for step, _ in points]
        if not points or sorted(set(steps)) != steps:
            raise ValueError(f"weight: {self.weight}: give a list of [step, weight] with increasing steps")
        if any(weight < 0 for _, weight in points):
            raise ValueError(f"weight: {self.weight}: must not be negative; give 0, or leave the loss out")
        return self

    def weight_at(self, step: int) -> float:
        """The weight at a step."""
        if not isinstance(self.weight, list):
            return self.weight
        (previous_step, weight), *later = self.weight
        for next_step, next_weight in later:
            if step < next_step:
                passed = max(0, step - previous_step)
                return weight + (next_weight - weight) * passed / (next_step - previous_step)
            previous_step, weight = next_step, next_weight
        return weight


class Objective(Loss):
    """The base of all objectives. A subclass is registered by its field in `ObjectivesConfig`."""

    TRAINS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The parts of the model that it trains, each with the settings under which it does. Encoders and a fusion need no
    mention: they exist only where one of these parts reads them."""

    COMPARES_ROWS: ClassVar[bool] = False
    """Whether it compares the rows of the batch by their embeddings. Otherwise it is a mean over `places`."""

    WHOLE_BATCH: ClassVar[str | None] = None
    """Why a batch cannot come in micro-batches, if it cannot."""

    def needs(self) -> Mapping[str, str]:
        """What it reads of the model or the tokenizer, each with the remedy where that is missing."""
        raise NotImplementedError

    def missing_target(self, loader: LoaderConfig) -> str | None:
        """The loader setting that would give it its target; None where the batches have one."""
        return None

    def over_all_ranks(self) -> Objective:
        """The same objective without settings that make it depend on the number of ranks."""
        return self

    def places(self, outputs: Outputs) -> Tensor:
        """(B, …) bool: the rows, tokens or pixels that the loss is the mean over."""
        raise NotImplementedError

    def loss(self, outputs: Outputs) -> Tensor:
        """This rank's part of the loss, (): the mean over ranks is the loss of the global batch."""
        raise NotImplementedError


def named_losses(losses: Config) -> dict[str, Any]:
    """The losses that a recipe names, in the order of the fields, which is the order of computation."""
    values = {name: getattr(losses, name) for name in type(losses).model_fields}
    return {name: loss for name, loss in values.items() if loss is not None}


def weighted_sum(losses: Mapping[str, Loss], values: Mapping[str, Tensor], step: int) -> Tensor:
    """The sum of the losses' values, (), each times its weight at a step."""
    import torch

    return torch.stack([loss.weight_at(step) * values[name] for name, loss in losses.items()]).sum()
