"""Similarity matrices within each side (CompRess, arXiv 2010.14713, eq. 1 and 2; SEED, arXiv 2101.04731, eq. 3): which
pictures the teacher finds alike, and which captions, neither of which pairs say anything of.

    loss = ½ · mean_i [ KL(p_i ‖ q_i) of the other pictures + the same of the other captions ]
    q_i = softmax_{j ≠ i}(⟨x_i, x_j⟩ / T) of the student,   p_i = Σ_t w_t · the same of teacher t

A row itself is left out, whose cosine is 1 to everybody.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmflow.learning.distillation.config import SimilaritiesConfig
from mmflow.learning.distillation.given import Heard, Space, averaged, divergence, scaled_products
from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, E a model's width of the shared space.


def similarities(heard: Heard, config: SimilaritiesConfig) -> Tensor:
    """The loss of a batch, ()."""
    return similarity_loss(heard.student.space, heard.spaces, heard.rows, heard.gather, config.temperature)


def similarity_loss(
    student: Space, teachers: Sequence[tuple[float, Space]], rows: GlobalRows, gather: Gather, temperature: float
) -> Tensor:
    """This rank's part of the loss, (). Widths may differ; the teachers' shares sum to 1."""
    columns_N = torch.arange(len(rows.real_N), device=rows.real_N.device)
    others_BN = rows.real_N & (columns_N != rows.columns_B[:, None])

    def alike(embeddings_BE: Tensor) -> Tensor:
        logits_BN = scaled_products(embeddings_BE, gather(embeddings_BE), 1 / temperature, others_BN)
        return logits_BN.log_softmax(-1)

    total_B = torch.zeros_like(rows.real_B, dtype=torch.float32)
    for side in ("image_BE", "text_BE"):
        teacher_BN = averaged([(share, alike(getattr(space, side))) for share, space in teachers])
        total_B = total_B + divergence(alike(getattr(student, side)), teacher_BN, others_BN)
    return rows.mean(0.5 * total_B)
