"""Hidden layers: the outputs of the student's layers close to those of the teacher's (TinyBERT, arXiv 1909.10351, eq.
8; FitNets, arXiv 1412.6550, eq. 3).

    loss = mean over places, units and pairs of layers of (W h − h^t)²

W is a projection where widths differ, one for each pair of layers. Both models must read the same places: the same
tokens, or the same number of regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmflow.learning.distillation.loss import (
    DistillationBatch,
    DistillationLoss,
    Layers,
    ModelTraits,
    Side,
    layers_apart,
    pair_layers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.rows import Gather

# Shapes: B rows of this rank, T places of a sequence, W the teacher's width.


class Hidden(DistillationLoss):
    """Squared distance between the outputs of layers, through a projection where widths differ."""

    sides: list[Side] = Field(min_length=1)
    """The encoders to compare."""
    layers: Layers = "even"
    """Which layers are compared: last with last, even (TinyBERT), or pairs [student's, teacher's] counted from 1."""

    NEEDS_TEACHER_MODEL: ClassVar = True
    READS_LAYERS: ClassVar = True
    TRAINS: ClassVar = ()

    def missing(self, student: ModelTraits, teacher: ModelTraits) -> str | None:
        reasons = (layers_apart(side, self.layers, student, teacher) for side in self.sides)
        return next((reason for reason in reasons if reason is not None), None)

    def layer_pairs(self, student: ModelTraits, teacher: ModelTraits) -> dict[Side, list[tuple[int, int]]]:
        counts = {side: [len(model.layers[side] or ()) for model in (student, teacher)] for side in self.sides}
        return {side: pair_layers(self.layers, *both) for side, both in counts.items()}

    def loss(self, batch: DistillationBatch) -> Tensor:
        """The mean over the sides."""
        import torch

        losses = []
        for teacher in batch.teachers:
            for side in self.sides:
                ours, theirs = batch.student.layers[side], teacher.live.layers[side]
                pairs = [
                    (teacher.project_layer(side, number, ours[here]), theirs[there])
                    for number, (here, there) in enumerate(teacher.layer_pairs[side])
                ]
                real_BT = batch.real_places(side, pairs[0][0].shape[1])
                losses.append(teacher.share * hidden_loss(pairs, real_BT, batch.gather))
        return torch.stack(losses).sum() / len(self.sides)


def hidden_loss(layers: Sequence[tuple[Tensor, Tensor]], real_BT: Tensor, gather: Gather) -> Tensor:
    """This rank's part of the loss, (). `layers` are outputs of the student's and the teacher's layers, (B, T, W) each;
    `real_BT` (bool) are the places that count."""
    import torch

    from mmflow.learning.rows import mean_of

    total_BT = torch.zeros_like(real_BT, dtype=torch.float32)
    for student_BTW, teacher_BTW in layers:
        total_BT = total_BT + (student_BTW.float() - teacher_BTW.float()).square().mean(-1)
    return mean_of(total_BT[real_BT], gather) / len(layers)
