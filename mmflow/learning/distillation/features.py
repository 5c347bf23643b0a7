"""Features: the student's embeddings close to the teacher's (CLIP-KD's feature distillation, arXiv 2307.12732, section
3.2), through a projection where widths differ (FitNets, arXiv 1412.6550, eq. 3).

    loss = ½ · mean_i Σ_t w_t [ ‖P_t x_i − x_i^t‖² + ‖P_t y_i − y_i^t‖² ],   all of unit length
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mmflow.learning.distillation.loss import DistillationBatch, DistillationLoss

if TYPE_CHECKING:
    from torch import Tensor


class Features(DistillationLoss):
    """Squared distance between the embeddings of student and teacher, through a projection where widths differ."""

    weight: float | list[tuple[int, float]] = 10.0
    """Multiplies the loss: a number, or a list of [step, weight] as objectives have it."""

    PROJECTS_EMBEDDINGS: ClassVar = True

    def loss(self, batch: DistillationBatch) -> Tensor:
        total_B = batch.rows.zeros()
        for student, (share, teacher) in zip(batch.projected, batch.teacher_embeddings, strict=True):
            for ours_BE, theirs_BE in ((student.image_BE, teacher.image_BE), (student.text_BE, teacher.text_BE)):
                total_B = total_B + share * (ours_BE.float() - theirs_BE.float()).square().sum(-1)
        return batch.rows.mean(0.5 * total_B)
