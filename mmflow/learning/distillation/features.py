"""Features: the student's embeddings where the teacher's are (CLIP-KD's feature distillation, arXiv 2307.12732, section
3.2), through a projection where widths differ (FitNets, arXiv 1412.6550, eq. 3).

    loss = ½ · mean_i Σ_t w_t [ ‖P_t x_i − x_i^t‖² + ‖P_t y_i − y_i^t‖² ],   all of unit length
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmflow.learning.distillation.config import FeaturesConfig
from mmflow.learning.distillation.given import Heard, Space
from mmflow.learning.rows import GlobalRows


def features(heard: Heard, config: FeaturesConfig) -> Tensor:
    """The loss of a batch, ()."""
    return feature_loss(heard.projected, heard.spaces, heard.rows)


def feature_loss(projected: Sequence[Space], teachers: Sequence[tuple[float, Space]], rows: GlobalRows) -> Tensor:
    """This rank's part of the loss, (). `projected` are the student's, one for each teacher, in its width."""
    total_B = torch.zeros_like(rows.real_B, dtype=torch.float32)
    for student, (share, teacher) in zip(projected, teachers, strict=True):
        for ours_BE, theirs_BE in ((student.image_BE, teacher.image_BE), (student.text_BE, teacher.text_BE)):
            total_B = total_B + share * (ours_BE.float() - theirs_BE.float()).square().sum(-1)
    return rows.mean(0.5 * total_B)
