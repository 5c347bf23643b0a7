"""The sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2), passed round the ranks (section 3.3).

    loss = −(1/n) Σ_i Σ_j log σ(z_ij · (s·⟨x_i, y_j⟩ + b)),   z_ij = 1 for a pair, −1 otherwise

No row needs the others' sum, so captions go from rank to rank, and with them the gradient they have gathered: after a
whole round both are home. Memory is O(B·E) however many ranks share the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmflow.learning.config import SigmoidConfig
from mmflow.learning.objectives.tiled import spread, strips
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import GlobalRows, PassOn

# Shapes: B rows of this rank, M of them real; K real rows of the rank whose captions are here; S rows of a strip; R
# ranks; E the width of the shared space.


def sigmoid(outputs: Outputs, config: SigmoidConfig) -> Tensor:
    """The objective of a batch, ()."""
    scale, bias = outputs.scale
    assert bias is not None, "check() has seen that the model has one"
    return sigmoid_loss(outputs.image_embedding, outputs.text_embedding, scale, bias, outputs.rows, outputs.pass_on)


def sigmoid_loss(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, logit_bias: Tensor, rows: GlobalRows, pass_on: PassOn
) -> Tensor:
    """The loss, (). `image_BE` and `text_BE` are of unit length; `logit_scale` and `logit_bias` are (1,).

    The gradient is made in the forward pass, while the captions are here: every rank must weigh the loss alike.
    """
    inputs = (each.float() for each in (image_BE, text_BE, logit_scale, logit_bias))
    with torch.autocast(image_BE.device.type, enabled=False):
        loss: Tensor = _SigmoidLoss.apply(*inputs, rows, pass_on)  # type: ignore[no-untyped-call]
    return loss


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor, rows: GlobalRows, pass_on: PassOn
    ) -> Tensor:
        real_RB = rows.real_N.view(rows.num_ranks, -1)
        rank = rows.first // len(image_BE)
        image_ME = image_BE[rows.real_B]
        image_gradient_ME = torch.zeros_like(image_ME)
        travelling_2BE = torch.stack((text_BE, torch.zeros_like(text_BE)))  # captions, and the gradient of each
        loss, bias_gradient = scale.new_zeros(()), torch.zeros_like(bias)
        for hop in range(rows.num_ranks):
            here_B = real_RB[(rank - hop) % rows.num_ranks]
            text_KE = travelling_2BE[0, here_B]
            text_gradient_KE = torch.zeros_like(text_KE)
            for strip in strips(len(image_ME), len(text_KE)):
                logits_SK = torch.addmm(bias, image_ME[strip] * scale, text_KE.T)
                # −log σ(z·l) = softplus(−z·l), whose slope by −z·l is σ(−z·l): only the pairs' sign is turned.
                pairs_S = logits_SK.diagonal(strip.start) if hop == 0 else logits_SK.new_empty(0)
                pairs_S.neg_()
                loss += torch.nn.functional.softplus(logits_SK).sum()
                slope_SK = logits_SK.sigmoid_()
                pairs_S.neg_()
                image_gradient_ME[strip] += slope_SK @ text_KE
                text_gradient_KE.addmm_(slope_SK.T, image_ME[strip])
                bias_gradient += slope_SK.sum()
            travelling_2BE[1, here_B] += text_gradient_KE
            travelling_2BE = pass_on(travelling_2BE)
        gradients = (
            spread(image_gradient_ME * scale, rows.real_B),
            travelling_2BE[1] * scale,
            (image_ME * image_gradient_ME).sum().reshape(scale.shape),
            bias_gradient,
        )
        context.save_for_backward(*(rows.share * each for each in gradients))
        return rows.share * loss

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradients[0] * each for each in context.saved_tensors), None, None
