"""Soft labels (Hinton, arXiv 1503.02531, section 2) over the candidates of a batch: which caption belongs to a picture,
and which picture to a caption.

    loss = T² · ½ · mean_i [ KL(p_i ‖ q_i) of captions for picture i + the same of pictures for caption i ]
    q_i = softmax_j(s·⟨x_i, y_j⟩ / T) of the student,   p_i = Σ_t w_t · the same of teacher t

At T = 1 with one teacher it is CLIP-KD's contrastive relational distillation (CRD, arXiv 2307.12732, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmflow.learning.distillation.config import SoftLabelsConfig
from mmflow.learning.distillation.given import Heard, Space, averaged, divergence, scaled_products
from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, E a model's width of the shared space.


def soft_labels(heard: Heard, config: SoftLabelsConfig) -> Tensor:
    """The loss of a batch, ()."""
    return soft_label_loss(heard.student.space, heard.spaces, heard.rows, heard.gather, config.temperature)


def soft_label_loss(
    student: Space, teachers: Sequence[tuple[float, Space]], rows: GlobalRows, gather: Gather, temperature: float
) -> Tensor:
    """This rank's part of the loss, (). Widths may differ; the teachers' shares sum to 1."""
    total_B = torch.zeros_like(rows.real_B, dtype=torch.float32)
    ours = _directions(student, rows, gather, temperature)
    theirs = [(share, _directions(space, rows, gather, temperature)) for share, space in teachers]
    for direction, student_BN in enumerate(ours):
        teacher_BN = averaged([(share, both[direction]) for share, both in theirs])
        total_B = total_B + divergence(student_BN, teacher_BN, rows.real_N)
    return rows.mean(0.5 * temperature**2 * total_B)


def _directions(space: Space, rows: GlobalRows, gather: Gather, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, N) log-probabilities of captions for each picture, and of pictures for each caption."""
    scale = space.logit_scale.float() / temperature
    image_NE, text_NE = gather(space.image_BE), gather(space.text_BE)
    captions_BN = scaled_products(space.image_BE, text_NE, scale, rows.real_N).log_softmax(-1)
    return captions_BN, scaled_products(space.text_BE, image_NE, scale, rows.real_N).log_softmax(-1)
