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
    Teachers,
    divergence,
    mean_log_probabilities,
    scaled_products,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Embeddings
    from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, E a model's width of the shared space.


class SoftLabels(DistillationLoss):
    """Divergence of the student's probabilities from the teacher's: of each caption for an image, and the reverse."""

    temperature: float = Field(1.0, gt=0)
    """Softens both; the loss is multiplied by its square, which keeps the size of the gradient. At 1 it is CLIP-KD's
    contrastive relational distillation (CRD)."""

    def loss(self, batch: DistillationBatch) -> Tensor:
        student = batch.student
        return soft_label_loss(
            student.embeddings, batch.teacher_embeddings, student.rows, student.ranks.gather, self.temperature
        )


def soft_label_loss(
    student: Embeddings, teachers: Teachers, rows: GlobalRows, gather: Gather, temperature: float
) -> Tensor:
    """This rank's part of the loss, (). Widths may differ."""
    total_B = rows.zeros()
    ours = _directions(student, rows, gather, temperature)
    theirs = [(share, _directions(teacher, rows, gather, temperature)) for share, teacher in teachers]
    for direction, student_BN in enumerate(ours):
        teacher_BN = mean_log_probabilities([(share, both[direction]) for share, both in theirs])
        total_B = total_B + divergence(student_BN, teacher_BN, rows.real_N)
    return rows.mean(0.5 * temperature**2 * total_B)


def _directions(model: Embeddings, rows: GlobalRows, gather: Gather, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, N) log-probabilities of captions for each image, and of images for each caption."""
    scale = model.logit_scale.float() / temperature
    image_NE, text_NE = gather(model.image_BE), gather(model.text_BE)
    captions_BN = scaled_products(model.image_BE, text_NE, scale, rows.real_N).log_softmax(-1)
    return captions_BN, scaled_products(model.text_BE, image_NE, scale, rows.real_N).log_softmax(-1)
