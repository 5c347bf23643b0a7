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
    divergence,
    mean_log_probabilities,
    scaled_products,
)

if TYPE_CHECKING:
    from torch import Tensor

# Shapes: B rows of this rank, N rows of all ranks, E a model's width of the shared space.


class Similarities(DistillationLoss):
    """Divergence of the student's similarities from the teacher's: among images, and among captions."""

    temperature: float = Field(0.1, gt=0)
    """The cosines of both are divided by it."""

    def loss(self, batch: DistillationBatch) -> Tensor:
        import torch

        rows, total_B = batch.rows, batch.rows.zeros()
        columns_N = torch.arange(len(rows.real_N), device=rows.real_N.device)
        others_BN = rows.real_N & (columns_N != rows.columns_B[:, None])

        def similar(embeddings_BE: Tensor) -> Tensor:
            products_BN = scaled_products(embeddings_BE, batch.gather(embeddings_BE), 1 / self.temperature, others_BN)
            return products_BN.log_softmax(-1)

        for side in (0, 1):  # images, captions
            theirs = [(share, similar(teacher[side])) for share, teacher in batch.teacher_embeddings]
            student_BN = similar(batch.student.embeddings[side])
            total_B = total_B + divergence(student_BN, mean_log_probabilities(theirs), others_BN)
        return rows.mean(0.5 * total_B)
