"""Interactive contrastive learning (ICL of CLIP-KD, arXiv 2307.12732, section 3.2): InfoNCE with the student's anchors
among the teacher's candidates.

    loss = −½ · mean_i Σ_t w_t [ log softmax_j(s·⟨P_t x_i, y_j^t⟩)_i + log softmax_j(s·⟨P_t y_i, x_j^t⟩)_i ]

s is the student's scale, P_t the projection to the width of teacher t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mmflow.learning.distillation.loss import DistillationBatch, DistillationLoss, scaled_products

if TYPE_CHECKING:
    from torch import Tensor

# Shapes: B rows of this rank, N rows of all ranks, E the teacher's width of the shared space.


class Interactive(DistillationLoss):
    """The student's images must find their captions among the teacher's, and its captions their images (ICL)."""

    PROJECTS_EMBEDDINGS: ClassVar = True

    def loss(self, batch: DistillationBatch) -> Tensor:
        rows, total_B = batch.rows, batch.rows.zeros()
        for student, (share, teacher) in zip(batch.projected, batch.teacher_embeddings, strict=True):
            scale = student.logit_scale.float()
            for anchors_BE, candidates_BE in ((student.image_BE, teacher.text_BE), (student.text_BE, teacher.image_BE)):
                logits_BN = scaled_products(anchors_BE, batch.gather(candidates_BE), scale, rows.real_N)
                right_B = logits_BN.log_softmax(-1).gather(1, rows.columns_B[:, None])[:, 0]
                total_B = total_B - share * right_B
        return rows.mean(0.5 * total_B)
