"""What is wrong with losses, found before anything is made: student and teachers are built without their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmflow.learning.distillation.config import DistillationLossesConfig
from mmflow.learning.distillation.table import Party, hearers
from mmflow.models.config import VOCABULARY_SIZE, ModelConfig
from mmflow.models.model import build


def check_losses(
    key: str, losses: DistillationLossesConfig, student: ModelConfig, teachers: Sequence[ModelConfig]
) -> None:
    """Raise RecipeError naming the loss that the student cannot learn or no teacher teach. `key` is the recipe's.

    Where an encoder comes from a checkpoint, whose weights would be read, it is found when the models are built.
    """
    models = (student, *teachers)
    if any(side is not None and side.checkpoint is not None for each in models for side in (each.image, each.text)):
        return
    with torch.device("meta"):
        learner, *taught = (_party(f"{key}.model", each) for each in models)
    hearers(key, losses, learner, taught)


def _party(key: str, config: ModelConfig) -> Party:
    model = build(key, config, config.vocabulary_size or VOCABULARY_SIZE, seed=0, num_classes=2)
    return Party(model.gives, model, config.image_pixels)
