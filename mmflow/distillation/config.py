"""How much of each lesson a student gets from its teacher."""

from __future__ import annotations

from pydantic import Field

from mmflow.config import Config


class LessonsConfig(Config):
    """Weights of the distillation losses, which the objectives' are added to."""

    soft_labels: float = Field(1.0, ge=0)
    """Kullback–Leibler divergence from the teacher's similarity rows to the student's."""
    features: float = Field(10.0, ge=0)
    """Distance between the embeddings of student and teacher."""
    temperature: float = Field(1.0, gt=0)
    """Softens both rows of similarities; the loss is scaled by its square, which keeps the gradient's size."""
