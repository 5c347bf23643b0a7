"""Hidden layers: what the student's layers give, by what the teacher's do (TinyBERT, arXiv 1909.10351, eq. 8; FitNets,
arXiv 1412.6550, eq. 3).

    loss = mean over places, units and pairs of layers of (W h − h^t)²

W is a projection where widths differ, one for each pair of layers. Both must read the same places: the same tokens, or
as many regions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmflow.learning.distillation.config import HiddenConfig
from mmflow.learning.distillation.given import Heard
from mmflow.learning.rows import Gather, mean_of

# Shapes: B rows of this rank, T places of a sequence, W the teacher's width.


def hidden(heard: Heard, config: HiddenConfig) -> Tensor:
    """The loss of a batch, (): the mean over the sides that are compared."""
    losses = []
    for teaching in heard.teachings:
        for side in config.sides:
            pairs = [
                (_projected(student_BTW, teaching.projections, f"{side}_{number}"), teacher_BTW)
                for number, (student_BTW, teacher_BTW) in enumerate(teaching.hidden[side])
            ]
            there_BT = heard.rows.real_B[:, None].expand(pairs[0][0].shape[:2])
            if side == "text":
                there_BT = there_BT & heard.student.live.token_mask.bool()
            losses.append(teaching.share * hidden_loss(pairs, there_BT, heard.gather))
    return torch.stack(losses).sum() / len(config.sides)


def hidden_loss(layers: Sequence[tuple[Tensor, Tensor]], there_BT: Tensor, gather: Gather) -> Tensor:
    """This rank's part of the loss, (). `layers` are what the student's and the teacher's give, (B, T, W) each;
    `there_BT` (bool) are the places that count."""
    total_BT = torch.zeros_like(there_BT, dtype=torch.float32)
    for student_BTW, teacher_BTW in layers:
        total_BT = total_BT + (student_BTW.float() - teacher_BTW.float()).square().mean(-1)
    return mean_of(total_BT[there_BT], gather) / len(layers)


def _projected(student_BTW: Tensor, projections: nn.ModuleDict, name: str) -> Tensor:
    projected: Tensor = projections[name](student_BTW) if name in projections else student_BTW
    return projected
