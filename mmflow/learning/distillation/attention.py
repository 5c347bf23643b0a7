"""Attention maps: the student's encoders attend where the teacher's do (MiniLM, arXiv 2002.10957, eq. 6).

    loss = mean over places t that read, pairs of heads and of layers of KL(A_t of the teacher ‖ A_t of the student)

The recipe says which layers and heads are compared: MiniLM compares the last layers, TinyBERT (arXiv 1909.10351,
section 3.1) layers evenly spaced. Both models must read the same places: the same tokens, or as many regions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmflow.learning.distillation.loss import (
    DistillationBatch,
    DistillationLoss,
    Layers,
    ModelTraits,
    Pairs,
    Side,
    layers_apart,
    pair_layers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs
    from mmflow.learning.rows import Gather

# Shapes: B rows of this rank, H heads, P pairs of heads, T places that read and that are read.


class Attention(DistillationLoss):
    """Divergence of the attention maps of the student's encoders from those of the teacher's."""

    sides: list[Side] = Field(min_length=1)
    """The encoders to compare."""
    layers: Layers = "last"
    """Which layers are compared: last with last (MiniLM), even (TinyBERT), or pairs [student's, teacher's] counted from
    1."""
    heads: Literal["mean", "same"] | Pairs = "mean"
    """Which heads are compared: the mean over all heads, those of the same number where both have as many, or pairs
    [student's, teacher's] counted from 1."""

    NEEDS_TEACHER_MODEL: ClassVar = True
    READS_LAYERS: ClassVar = True
    TRAINS: ClassVar = ()

    def missing(self, student: ModelTraits, teacher: ModelTraits) -> str | None:
        for side in self.sides:
            for name, model in (("student", student), ("teacher", teacher)):
                if (layers := model.layers[side]) is not None and layers.num_heads is None:
                    return (
                        f"the {name}'s {side} encoder has no attention maps; use one with attention, or remove it from "
                        "sides"
                    )
            reason = layers_apart(side, self.layers, student, teacher) or self._heads_apart(side, student, teacher)
            if reason is not None:
                return reason
        return None

    def _heads_apart(self, side: Side, student: ModelTraits, teacher: ModelTraits) -> str | None:
        ours, theirs = (model.layers[side].num_heads for model in (student, teacher))  # type: ignore[union-attr]
        assert ours is not None
        assert theirs is not None
        counts = f"the student's {side} encoder has {ours} heads and the teacher's {theirs}"
        if self.heads == "same" and ours != theirs:
            return f"heads: same, but {counts}; use mean, or pairs of heads"
        for here, there in self.heads if isinstance(self.heads, list) else ():
            if not (1 <= here <= ours and 1 <= there <= theirs):
                return f"heads: [{here}, {there}], but {counts}; name others"
        return None

    def attention_sides(self) -> Collection[Side]:
        return self.sides

    def loss(self, batch: DistillationBatch) -> Tensor:
        """The mean over the sides."""
        import torch

        losses = []
        for teacher in batch.teachers:
            for side in self.sides:
                ours, theirs = _maps(batch.student, side), _maps(teacher.live, side)
                pairs = [
                    (ours[here], theirs[there]) for here, there in pair_layers(self.layers, len(ours), len(theirs))
                ]
                real_BT = batch.real_places(side, pairs[0][0].shape[-1])
                losses.append(teacher.share * attention_loss(pairs, self.heads, real_BT, batch.gather))
        return torch.stack(losses).sum() / len(self.sides)


def attention_loss(
    layers: Sequence[tuple[Tensor, Tensor]], heads: Literal["mean", "same"] | Pairs, real_BT: Tensor, gather: Gather
) -> Tensor:
    """This rank's part of the loss, (). `layers` are the student's and the teacher's maps, (B, heads, T, T) each, with
    distributions as rows; only the rows of the places `real_BT` (bool) count."""
    import torch

    from mmflow.learning.rows import mean_of

    total_BT = torch.zeros_like(real_BT, dtype=torch.float32)
    for student_BHTT, teacher_BHTT in layers:
        student_BPTT, teacher_BPTT = _paired(student_BHTT.float(), teacher_BHTT.float(), heads)
        # Clamped: a student's weight that is exactly 0 must not make the loss infinite.
        surprisal_BPTT = -student_BPTT.clamp(min=torch.finfo(torch.float32).tiny).log()
        divergence_BPT = (torch.xlogy(teacher_BPTT, teacher_BPTT) + teacher_BPTT * surprisal_BPTT).sum(-1)
        total_BT = total_BT + divergence_BPT.mean(1)
    return mean_of(total_BT[real_BT], gather) / len(layers)


def _paired(student_BHTT: Tensor, teacher_BHTT: Tensor, heads: Literal["mean", "same"] | Pairs) -> tuple[Tensor, ...]:
    if heads == "same":
        return student_BHTT, teacher_BHTT
    if heads == "mean":
        return student_BHTT.mean(1, keepdim=True), teacher_BHTT.mean(1, keepdim=True)
    return student_BHTT[:, [here - 1 for here, _ in heads]], teacher_BHTT[:, [there - 1 for _, there in heads]]


def _maps(outputs: Outputs, side: Side) -> tuple[Tensor, ...]:
    encoded = outputs.image if side == "image" else outputs.text
    assert encoded is not None
    assert encoded.attentions is not None, "missing() has seen that the encoder has maps"
    return encoded.attentions
