"""InfoNCE's normalisers without its matrix: strips of similarities, made again in the backward pass.

As Inf-CL (arXiv 2410.17243, section 3), but a strip serves both directions: its rows are this rank's images, its
columns all ranks' captions, and the captions' sums over images are joined across ranks, two numbers each. That is half
of the products of two directions taken apart, and memory O(N·E) where the matrix takes O(B·N).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, M of them real; N rows of all ranks, K of them real; S rows of a strip; P parts of a
# sum; E the width of the shared space.

STRIP_ELEMENTS = 1 << 22  # 16 MiB: 4,096 × 512 on one core take 0.90 s, and 1.25 s in strips of 64 MiB


def strips(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Rows a strip at a time, each of about `STRIP_ELEMENTS` similarities."""
    step = max(1, STRIP_ELEMENTS // max(1, num_columns))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def pair_surprisals(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, rows: GlobalRows, gather: Gather
) -> tuple[Tensor, Tensor]:
    """−log softmax of each row's own pair: among all captions for its image, and among all images for its caption.

    Both (B,) fp32, 0 for padding. The similarities are `logit_scale` (1,) times the products of the rows.
    """
    inputs = image_BE.float(), gather(text_BE.float()), logit_scale.float()
    with torch.autocast(image_BE.device.type, enabled=False):
        by_image_B, by_text_B = _PairSurprisals.apply(*inputs, rows, gather)  # type: ignore[no-untyped-call]
    return by_image_B, by_text_B


class _PairSurprisals(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, image_BE: Tensor, text_NE: Tensor, scale: Tensor, rows: GlobalRows, gather: Gather
    ) -> tuple[Tensor, Tensor]:
        image_ME, text_KE = image_BE[rows.real_B], text_NE[rows.real_N]
        first = int(rows.real_N[: rows.first].sum())  # this rank's first among the K
        highest_M, sum_M, right_M = (image_ME.new_empty(len(image_ME)) for _ in range(3))
        highest_K, sum_K = text_KE.new_full((len(text_KE),), -torch.inf), text_KE.new_zeros(len(text_KE))
        for strip in strips(len(image_ME), len(text_KE)):
            logits_SK = (image_ME[strip] * scale) @ text_KE.T
            right_M[strip] = logits_SK.diagonal(first + strip.start)
            highest_M[strip] = logits_SK.amax(1)
            sum_M[strip] = (logits_SK - highest_M[strip, None]).exp_().sum(1)
            strip_highest_K = logits_SK.amax(0)
            strip_sum_K = logits_SK.sub_(strip_highest_K).exp_().sum(0)
            highest_K, sum_K = _join(torch.stack((highest_K, strip_highest_K)), torch.stack((sum_K, strip_sum_K)))
        highest_K, sum_K = _join(gather(highest_K[None]), gather(sum_K[None]))
        context.save_for_backward(image_BE, text_NE, scale, highest_M, sum_M, highest_K, sum_K)
        context.rows, context.gather, context.first = rows, gather, first
        own = slice(first, first + len(image_ME))
        # Highest logit less the right one is exact; the logarithm of the whole sum would round at the logits' size.
        by_image_M = highest_M - right_M + sum_M.log()
        by_text_M = highest_K[own] - right_M + sum_K[own].log()
        return spread(by_image_M, rows.real_B), spread(by_text_M, rows.real_B)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image_BE, text_NE, scale, highest_M, sum_M, highest_K, sum_K = context.saved_tensors
        rows, first = context.rows, context.first
        image_ME, text_KE = image_BE[rows.real_B], text_NE[rows.real_N]
        by_image_M = gradients[0][rows.real_B]
        by_text_K = context.gather(gradients[1])[rows.real_N]
        by_pair_M = by_image_M + by_text_K[first : first + len(image_ME)]
        image_gradient_ME, text_gradient_KE = torch.empty_like(image_ME), torch.zeros_like(text_KE)
        with torch.autocast(image_ME.device.type, enabled=False):
            for strip in strips(len(image_ME), len(text_KE)):
                logits_SK = (image_ME[strip] * scale) @ text_KE.T
                # The slope by a logit: both softmaxes, each times its loss's gradient, less those of the pair.
                slope_SK = (logits_SK - highest_M[strip, None]).exp_().mul_((by_image_M / sum_M)[strip, None])
                slope_SK += logits_SK.sub_(highest_K).exp_().mul_(by_text_K / sum_K)
                slope_SK.diagonal(first + strip.start).sub_(by_pair_M[strip])
                image_gradient_ME[strip] = slope_SK @ text_KE
                text_gradient_KE.addmm_(slope_SK.T, image_ME[strip])
        scale_gradient = (image_ME * image_gradient_ME).sum().reshape(scale.shape)
        image_gradient_BE = spread(image_gradient_ME.mul_(scale), rows.real_B)
        text_gradient_NE = spread(text_gradient_KE.mul_(scale), rows.real_N)
        return image_gradient_BE, text_gradient_NE, scale_gradient, None, None


def _join(highest_PK: Tensor, sum_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Of sums in P parts: the highest logit (K,), and the sum of exponentials relative to it (K,)."""
    highest_K = highest_PK.amax(0)
    return highest_K, (sum_PK * (highest_PK - highest_K).exp()).sum(0)


def spread(values_M: Tensor, real_B: Tensor) -> Tensor:
    """(B, …) with the real rows' values in their places and 0 elsewhere."""
    spread_B = values_M.new_zeros(len(real_B), *values_M.shape[1:])
    spread_B[real_B] = values_M
    return spread_B
