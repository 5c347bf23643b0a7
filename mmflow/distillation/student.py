"""The student while it learns: its model, and where its embeddings are narrower or wider than the teacher's, a
projection to compare them through, which is left out of the package."""

from __future__ import annotations

from torch import Tensor, nn

from mmflow.errors import RecipeError
from mmflow.models.model import Model

SIDES = ("image_embedding", "text_embedding")


class Student(nn.Module):
    """A model whose outputs carry `projected`: its embeddings in the teacher's width, of unit length."""

    def __init__(self, model: Model, teacher_width: int) -> None:
        super().__init__()
        self.model = model
        width = model.embedding_width
        if width is None:
            raise RecipeError("distill.model.embedding_width: null, and lessons are of embeddings; give a width")
        self.projections = nn.ModuleDict(
            {side: nn.Linear(width, teacher_width, bias=False) for side in SIDES} if width != teacher_width else {}
        )

    def forward(self, pixels_B3HS: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> dict[str, Tensor]:
        """The model's outputs, and `projected_image_embedding` and `projected_text_embedding`, (B, teacher width)."""
        outputs: dict[str, Tensor] = self.model(pixels_B3HS, token_ids_BT, token_mask_BT)
        for side in SIDES:
            projected = self.projections[side](outputs[side]) if side in self.projections else outputs[side]
            outputs[f"projected_{side}"] = nn.functional.normalize(projected, dim=-1)
        return outputs
