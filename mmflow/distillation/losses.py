"""What a student learns from its teacher beyond the pairs: soft labels and features.

Soft labels are Hinton's (arXiv 1503.02531, section 2) over the in-batch similarities, as CLIP-KD's "CRD" (arXiv
2307.12732, eq. 3); features are its "FD" (eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmflow.objectives.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, E the student's width and F the teacher's.

SIDES = ("image_embedding", "text_embedding")


def soft_label_loss(
    student: dict[str, Tensor], teacher: dict[str, Tensor], rows: GlobalRows, gather: Gather, temperature: float
) -> Tensor:
    """T² · KL(teacher ‖ student) of the similarity rows, the mean of both directions, ().

    `student` and `teacher` hold `image_embedding`, `text_embedding` and `logit_scale`; their widths may differ.
    """
    total_B = torch.zeros_like(rows.real_B, dtype=torch.float32)
    for here, there in (SIDES, SIDES[::-1]):
        student_BN, teacher_BN = (
            similarities(side[here], gather(side[there]), side["logit_scale"] / temperature, rows.real_N)
            .float()
            .log_softmax(dim=-1)
            for side in (student, teacher)
        )
        total_B = total_B + (teacher_BN.exp() * (teacher_BN - student_BN)).masked_fill(~rows.real_N, 0.0).sum(-1)
    return rows.mean(0.5 * temperature**2 * total_B)


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor], rows: GlobalRows) -> Tensor:
    """Squared distance between the unit embeddings of student (its `projected_…`) and teacher, both sides' mean, ()."""
    total_B = torch.zeros_like(rows.real_B, dtype=torch.float32)
    for side in SIDES:
        total_B = total_B + (student[f"projected_{side}"].float() - teacher[side].float()).square().sum(-1)
    return rows.mean(0.5 * total_B)


def similarities(rows_BE: Tensor, columns_NE: Tensor, logit_scale: Tensor, real_N: Tensor) -> Tensor:
    """(B, N) scaled cosines; columns of padding are the lowest finite number, so that softmax gives them nothing."""
    logits_BN = logit_scale * rows_BE @ columns_NE.T
    return logits_BN.masked_fill(~real_N, torch.finfo(logits_BN.dtype).min)
