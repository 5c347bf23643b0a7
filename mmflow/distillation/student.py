"""The student while it learns: its model, its objectives and the lessons of a teacher, as one module.

Where its embeddings are narrower or wider than the teacher's, they are compared through a projection, which is left out
of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmflow.distillation.config import LessonsConfig
from mmflow.distillation.losses import SIDES, feature_loss, soft_label_loss
from mmflow.errors import RecipeError
from mmflow.loading.batches import Batch
from mmflow.models.package import LoadedModel
from mmflow.objectives.learner import Learner, Parts, scales
from mmflow.objectives.objectives import total
from mmflow.objectives.outputs import Outputs


class Student(nn.Module):
    """A learner that also hears its teacher, who does not learn."""

    def __init__(self, learner: Learner, teacher: LoadedModel, lessons: LessonsConfig) -> None:
        super().__init__()
        self.learner = learner
        self.lessons = lessons
        teacher.model.requires_grad_(False)
        self._teacher = (teacher,)  # in a tuple, or its weights were parameters of this module
        width, taught = learner.config.embedding_width, teacher.config.embedding_width
        if width is None or taught is None:
            raise RecipeError("distill.model.embedding_width: null, and lessons are of embeddings; give a width")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(learner.seed)  # a restart from the first step must draw the same
            self.projections = nn.ModuleDict(
                {side: nn.Linear(width, taught, bias=False) for side in SIDES} if width != taught else {}
            )

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Parts]:
        """The loss to descend at a step, (), and by name each objective's part, each lesson's, and the logit scale."""
        (teacher,) = self._teacher
        rows = self.learner.rows(batch)
        with torch.no_grad():
            teacher.model.to(batch.pixels.device)
            taught = embeddings(self.learner.outputs(teacher.model, teacher.config, batch, step, rows))
        outputs = self.learner.outputs(self.learner.model, self.learner.config, batch, step, rows)
        loss, parts = total(outputs, self.learner.objectives, step)
        learnt = embeddings(outputs)
        for side in SIDES:
            projected = self.projections[side](learnt[side]) if side in self.projections else learnt[side]
            learnt[f"projected_{side}"] = nn.functional.normalize(projected, dim=-1)
        lessons = {
            "soft_labels": soft_label_loss(learnt, taught, outputs.rows, outputs.gather, self.lessons.temperature),
            "features": feature_loss(learnt, taught, outputs.rows),
        }
        for name, lesson in lessons.items():
            loss = loss + getattr(self.lessons, name) * lesson
        return loss, parts | lessons | scales(outputs)


def embeddings(outputs: Outputs) -> dict[str, Tensor]:
    """`image_embedding` and `text_embedding` (B, E) of unit length, and `logit_scale` (1,)."""
    return {
        "image_embedding": outputs.image_embedding,
        "text_embedding": outputs.text_embedding,
        "logit_scale": outputs.scale.logit_scale,
    }
