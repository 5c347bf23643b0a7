"""Similarity matrices within each side (CompRess, arXiv 2010.14713, eq. 1 and 2; SEED, arXiv 2101.04731, eq. 3): which
images are similar to the teacher, and which captions. Pairs say nothing of either.

    loss = ½ · mean_i [ KL(p_i ‖ q_i) of the other images + the same of the other captions ]
    q_i = softmax_{j ≠ i}(⟨x_i, x_j⟩ / T) of the student,   p_i = Σ_t w_t · the same of teacher t

A row itself is left out, because its cosine is 1 for every model.
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


class Similarities(DistillationLoss):
    """Divergence of the student's similarities from the teacher's: among images, and among captions."""

    temperature: float = Field(0.1, gt=0)
    """The cosines of both are divided by it."""

    def loss(self, batch: DistillationBatch) -> Tensor:
        student = batch.student
        return similarity_loss(
            student.embeddings, batch.teacher_embeddings, student.rows, student.ranks.gather, self.temperature
        )


def similarity_loss(
    student: Embeddings, teachers: Teachers, rows: GlobalRows, gather: Gather, temperature: float
) -> Tensor:
    """This rank's part of the loss, (). Widths may differ."""
    import torch

    columns_N = torch.arange(len(rows.real_N), device=rows.real_N.device)
    others_BN = rows.real_N & (columns_N != rows.columns_B[:, None])

    def similar(embeddings_BE: Tensor) -> Tensor:
        logits_BN = scaled_products(embeddings_BE, gather(embeddings_BE), 1 / temperature, others_BN)
        return logits_BN.log_softmax(-1)

    total_B = rows.zeros()
    for side in ("image_BE", "text_BE"):
        teacher_BN = mean_log_probabilities([(share, similar(getattr(teacher, side))) for share, teacher in teachers])
        total_B = total_B + divergence(similar(getattr(student, side)), teacher_BN, others_BN)
    return rows.mean(0.5 * total_B)
