"""The losses of a recipe: what each reads of student and teacher, who is heard in it, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.learning.distillation.attention import attention
from mmflow.learning.distillation.config import (
    AttentionConfig,
    DistillationLossConfig,
    DistillationLossesConfig,
    HiddenConfig,
)
from mmflow.learning.distillation.features import features
from mmflow.learning.distillation.given import SIDES, Heard
from mmflow.learning.distillation.hidden import hidden
from mmflow.learning.distillation.interactive import interactive
from mmflow.learning.distillation.layers import LayersOf, describe, encoder_of, layer_pairs
from mmflow.learning.distillation.ranking import ranking
from mmflow.learning.distillation.similarities import similarities
from mmflow.learning.distillation.soft_labels import soft_labels
from mmflow.models.encoders import ImageEncoder
from mmflow.models.model import Model

LOSSES: dict[str, Callable[[Heard, Any], Tensor]] = {
    "soft_labels": soft_labels,
    "similarities": similarities,
    "features": features,
    "interactive": interactive,
    "attention": attention,
    "hidden": hidden,
    "ranking": ranking,
}
"""By name: a batch of this rank and the loss's section → the loss (), whose mean over ranks is that of the global
batch."""

PROJECTED = ("features", "interactive")
"""Losses that compare embeddings in the teacher's width."""

LIVE = ("attention", "hidden", "ranking")
"""Losses that read more of a teacher than the embeddings that a cache holds."""


@dataclass(frozen=True)
class Party:
    """The student or a teacher, as far as losses must know it before they begin."""

    gives: frozenset[str]
    model: Model | None  # None: a teacher of whom nothing but cached embeddings is there
    image_pixels: int = 0
    own_text: bool = False  # a teacher whose tokens are not the student's

    @cached_property
    def layers(self) -> Mapping[str, LayersOf | None]:
        """Of each side's encoder; None where its layers cannot be compared."""
        encoders = {side: encoder_of(self.model, side) if self.model else None for side in SIDES}
        return {
            side: None if encoder is None else describe(encoder, self.image_pixels)
            for side, encoder in encoders.items()
        }


def hearers(
    key: str, losses: DistillationLossesConfig, student: Party, teachers: Sequence[Party]
) -> dict[str, list[int]]:
    """By loss the numbers of the teachers that are heard in it: those that give what it reads.

    `key` is the recipe's of the stage. Raises RecipeError where the student does not give it, or no teacher does.
    """
    heard = {}
    for name, section in losses.named.items():
        reasons = [_missing(name, section, student, teacher) for teacher in teachers]
        heard[name] = [number for number, reason in enumerate(reasons) if reason is None]
        if not heard[name]:
            raise RecipeError(f"{key}.losses.{name}: {reasons[0]}, or leave {name} out")
    return heard


def _missing(name: str, section: DistillationLossConfig, student: Party, teacher: Party) -> str | None:
    """What keeps a loss from being taught, and the remedy; None where nothing does."""
    if isinstance(section, AttentionConfig | HiddenConfig):
        for side in section.sides:
            reason = _apart(section, side, student, teacher)
            if reason is not None:
                return reason
        return None
    remedy = "a text encoder and an embedding_width"
    if "embeddings" not in student.gives:
        return f"the student gives no embeddings; give its model {remedy}"
    if name == "ranking":
        if "matching_logits" not in teacher.gives:
            return "the teacher has no matching_logits; teach by a model with a fusion and the head matching"
    elif "embeddings" not in teacher.gives:
        return f"the teacher gives no embeddings; teach by a model with {remedy}"
    return None


def _apart(section: AttentionConfig | HiddenConfig, side: str, student: Party, teacher: Party) -> str | None:
    """Why the layers of a side cannot be compared."""
    for who, party in (("student", student), ("teacher", teacher)):
        layers = party.layers[side]
        if layers is None:
            return (
                f"the {who}'s {side} side has no layers to compare (nor have clips and windows); leave it out of sides"
            )
        if isinstance(section, AttentionConfig) and layers.heads is None:
            return f"the {who}'s {side} encoder has no attention maps; use one that attends, or leave it out of sides"
    ours, theirs = student.layers[side], teacher.layers[side]
    assert ours is not None
    assert theirs is not None
    encoder = encoder_of(student.model, side) if student.model else None
    if isinstance(encoder, ImageEncoder) and encoder.patch_dropout is not None:
        return "the student drops patches that the teacher sees; set its image.patch_dropout to 0"
    if side == "text" and teacher.own_text:
        return "the teacher reads other tokens than the student; leave it out of sides"
    pairs = layer_pairs(section.layers, len(ours), len(theirs))
    for student_layer, teacher_layer in pairs:
        if not (0 <= student_layer < len(ours) and 0 <= teacher_layer < len(theirs)):
            return (
                f"layers: [{student_layer + 1}, {teacher_layer + 1}], and the student's {side} encoder has {len(ours)} "
                f"and the teacher's {len(theirs)}; name others"
            )
        if ours.places is not None and theirs.places is not None:
            seen, taught = ours.places[student_layer], theirs.places[teacher_layer]
            if seen != taught:
                return (
                    f"the student's layer {student_layer + 1} has {seen} regions and the teacher's layer "
                    f"{teacher_layer + 1} has {taught}; make image_pixels over patch_size equal, or name other layers"
                )
    return _apart_heads(section, side, ours, theirs) if isinstance(section, AttentionConfig) else None


def _apart_heads(section: AttentionConfig, side: str, ours: LayersOf, theirs: LayersOf) -> str | None:
    assert ours.heads is not None
    assert theirs.heads is not None
    counts = f"the student's {side} encoder has {ours.heads} and the teacher's {theirs.heads}"
    if section.heads == "same" and ours.heads != theirs.heads:
        return f"heads: same, and {counts}; use mean, or pairs of heads"
    if not isinstance(section.heads, str):
        for head, taught in section.heads:
            if not (1 <= head <= ours.heads and 1 <= taught <= theirs.heads):
                return f"heads: [{head}, {taught}], and {counts}; name others"
    return None


def total_of_losses(
    losses: DistillationLossesConfig, heard: Mapping[str, Heard], step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses' part of the loss to descend at a step, (), and each loss's own before its weight, by name."""
    parts = {name: LOSSES[name](heard[name], section) for name, section in losses.named.items()}
    weights = [section.weight_at(step) for section in losses.named.values()]
    return torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)]).sum(), parts
