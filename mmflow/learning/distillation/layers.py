"""The layers of encoders: how many there are, what each gives, and which of the student's goes with which of the
teacher's."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmflow.learning.distillation.config import Layers
from mmflow.models.backbones import layers_of
from mmflow.models.encoders import ImageEncoder, TextEncoder
from mmflow.models.model import Model

# Shapes: B batch, T tokens or regions, W width.


@dataclass(frozen=True)
class LayersOf:
    """What an encoder's layers are like, without a forward pass of its weights."""

    widths: tuple[int, ...]
    places: tuple[int, ...] | None  # regions of each; None: as many as there are tokens
    heads: int | None  # of attention; None: it has no maps of all places

    def __len__(self) -> int:
        return len(self.widths)


def encoder_of(model: Model, side: str) -> ImageEncoder | TextEncoder | None:
    """The encoder of a side whose layers can be compared: one of pictures, not clips; of texts, not windows."""
    tower = getattr(model, side)
    return tower if isinstance(tower, (ImageEncoder, TextEncoder)) else None


def describe(encoder: ImageEncoder | TextEncoder, image_pixels: int) -> LayersOf | None:
    """An encoder's layers; None where its backbone has no list of them."""
    backbone = encoder.backbone
    found = layers_of(backbone)
    if found is None:
        return None
    heads = getattr(backbone.config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else None
    if isinstance(encoder, TextEncoder):
        return LayersOf((encoder.width,) * len(found[1]), None, heads)
    shapes = _shapes(encoder, len(found[1]), image_pixels)
    return LayersOf(tuple(width for _, width in shapes), tuple(places for places, _ in shapes), heads)


def layer_pairs(layers: Layers, num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """(student's, teacher's) counted from 0. Evenly spaced is TinyBERT's g(m) = m · N / M, counted from 1 and rounded
    up, so that last goes with last."""
    if layers == "last":
        return [(num_student - 1, num_teacher - 1)]
    if layers == "even":
        return [(number - 1, -(-number * num_teacher // num_student) - 1) for number in range(1, num_student + 1)]
    return [(student - 1, teacher - 1) for student, teacher in layers]


@contextmanager
def captured(backbone: Any, numbers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, what the layers of these numbers give, (B, T, W), of each forward pass the last."""
    found = layers_of(backbone)
    assert found is not None, "check() has seen that it has layers"
    outputs: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # Stages of a convolutional backbone give a map (B, W, h, w).
            outputs[number] = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden

        return hook

    with ExitStack() as hooks:
        for number in set(numbers):
            hooks.callback(found[1][number].register_forward_hook(keep(number)).remove)
        yield outputs


def _shapes(encoder: ImageEncoder, num_layers: int, image_pixels: int) -> list[tuple[int, int]]:
    """(places, width) of each layer for one picture, from tensors without storage."""
    backbone = encoder.backbone
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    weightless = {name: tensor.to("meta") for name, tensor in tensors.items()}
    picture = torch.empty(1, 3, image_pixels, image_pixels, device="meta")
    was_training = encoder.training
    encoder.eval()  # batch norms would count a picture of nothing
    try:
        with captured(backbone, range(num_layers)) as outputs, torch.no_grad():
            torch.func.functional_call(backbone, weightless, (picture,))
    finally:
        encoder.train(was_training)
    return [(outputs[number].shape[1], outputs[number].shape[2]) for number in range(num_layers)]
