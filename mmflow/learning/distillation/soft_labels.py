"""Soft labels (Hinton, arXiv 1503.02531, section 2) over the candidates of a batch: which caption belongs to an image,
and which image to a caption.

    loss = T² · ½ · mean_i [ KL(p_i ‖ q_i) of captions for image i + the same of images for caption i ]
    q_i = softmax_j(s·⟨x_i, y_j⟩ / T) of the student,   p_i = Σ_t w_t · the same of teacher t

At T = 1 with one teacher it is CLIP-KD's contrastive relational distillation (CRD, arXiv 2307.12732, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mmflow.learning.distillation.loss import (
    DistillationBatch,
    DistillationLoss,
    divergence,
    mean_log_probabilities,
    scaled_products,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Embeddings

# Shapes: B rows of this rank, N rows of all ranks, E a model's width of the shared space.


class SoftLabels(DistillationLoss):
    """Divergence of the student's probabilities from the teacher's: of each caption for an image, and the reverse."""

    temperature: float = Field(1.0, gt=0)
    """Softens both; the loss is multiplied by its square, which keeps the size of the gradient. At 1 it is CLIP-KD's
    contrastive relational distillation (CRD)."""

    def loss(self, batch: DistillationBatch) -> Tensor:
        rows, total_B = batch.rows, batch.rows.zeros()
        ours = self._directions(batch.student.embeddings, batch)
        theirs = [(share, self._directions(teacher, batch)) for share, teacher in batch.teacher_embeddings]
        for direction, student_BN in enumerate(ours):
            teacher_BN = mean_log_probabilities([(share, both[direction]) for share, both in theirs])
            total_B = total_B + divergence(student_BN, teacher_BN, rows.real_N)
        return rows.mean(0.5 * self.temperature**2 * total_B)

    def _directions(self, model: Embeddings, batch: DistillationBatch) -> tuple[Tensor, Tensor]:
        """(B, N) log-probabilities of captions for each image, and of images for each caption."""
        scale, real_N = model.logit_scale.float() / self.temperature, batch.rows.real_N
        image_NE, text_NE = batch.gather(model.image_BE), batch.gather(model.text_BE)
        captions_BN = scaled_products(model.image_BE, text_NE, scale, real_N).log_softmax(-1)
        return captions_BN, scaled_products(model.text_BE, image_NE, scale, real_N).log_softmax(-1)
