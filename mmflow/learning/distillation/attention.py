"""Attention maps: where the student's encoders look, by where the teacher's do (MiniLM, arXiv 2002.10957, eq. 6).

    loss = mean over places t that read, pairs of heads and of layers of KL(A_t of the teacher ‖ A_t of the student)

Which layers and heads are compared is the recipe's: MiniLM compares the last layers, TinyBERT (arXiv 1909.10351,
section 3.1) layers evenly spaced. Both must read the same places: the same tokens, or as many regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmflow.learning.distillation.config import AttentionConfig, Pairs
from mmflow.learning.distillation.given import Given, Heard
from mmflow.learning.distillation.layers import layer_pairs
from mmflow.learning.rows import Gather, mean_of

# Shapes: B rows of this rank, H heads, P pairs of heads, T places that read and that are read.


def attention(heard: Heard, config: AttentionConfig) -> Tensor:
    """The loss of a batch, (): the mean over the sides that are compared."""
    losses = []
    for teaching in heard.teachings:
        for side in config.sides:
            ours, theirs = _maps(heard.student, side), _maps(teaching.given, side)
            pairs = [
                (ours[student], theirs[teacher])
                for student, teacher in layer_pairs(config.layers, len(ours), len(theirs))
            ]
            there_BT = heard.rows.real_B[:, None].expand(pairs[0][0].shape[:1] + pairs[0][0].shape[-1:])
            if side == "text":
                there_BT = there_BT & heard.student.live.token_mask.bool()
            losses.append(teaching.share * attention_loss(pairs, config.heads, there_BT, heard.gather))
    return torch.stack(losses).sum() / len(config.sides)


def attention_loss(
    layers: Sequence[tuple[Tensor, Tensor]], heads: Literal["mean", "same"] | Pairs, there_BT: Tensor, gather: Gather
) -> Tensor:
    """This rank's part of the loss, (). `layers` are the student's and the teacher's maps, (B, heads, T, T) each, whose
    rows are distributions; `there_BT` (bool) are the places whose rows count."""
    total_BT = torch.zeros_like(there_BT, dtype=torch.float32)
    for student_BHTT, teacher_BHTT in layers:
        student_BPTT, teacher_BPTT = _paired(student_BHTT.float(), teacher_BHTT.float(), heads)
        # A student's weight that has become 0 is no reason for an infinite loss.
        surprise_BPTT = -student_BPTT.clamp(min=torch.finfo(torch.float32).tiny).log()
        divergence_BPT = (torch.xlogy(teacher_BPTT, teacher_BPTT) + teacher_BPTT * surprise_BPTT).sum(-1)
        total_BT = total_BT + divergence_BPT.mean(1)
    return mean_of(total_BT[there_BT], gather) / len(layers)


def _paired(student_BHTT: Tensor, teacher_BHTT: Tensor, heads: Literal["mean", "same"] | Pairs) -> tuple[Tensor, ...]:
    if heads == "same":
        return student_BHTT, teacher_BHTT
    if heads == "mean":
        return student_BHTT.mean(1, keepdim=True), teacher_BHTT.mean(1, keepdim=True)
    return student_BHTT[:, [ours - 1 for ours, _ in heads]], teacher_BHTT[:, [theirs - 1 for _, theirs in heads]]


def _maps(given: Given, side: str) -> tuple[Tensor, ...]:
    encoded = given.live.image if side == "image" else given.live.text
    assert encoded is not None
    assert encoded.attentions is not None, "check() has seen that both attend"
    return encoded.attentions
