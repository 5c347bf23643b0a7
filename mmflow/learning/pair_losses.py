"""Losses over all pairs of a global batch without the matrix of similarities, which is computed a strip of rows at a
time.

- InfoNCE, recomputed in the backward pass as in Inf-CL (arXiv 2410.17243, section 3). Here one strip serves both
  directions: its rows are this rank's images, its columns all ranks' captions, and the captions' sums over images are
  joined across ranks, two numbers each. That is half the products of two separate directions, and memory O(N·E) instead
  of the matrix's O(B·N).
- SigLIP's loss, with the captions passed around the ring of ranks (arXiv 2303.15343, section 3.3).
- Hard negatives, drawn by similarity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmflow.learning.rows import Gather, GlobalRows, RingShift

# Shapes: B rows of this rank, M of them real; N rows of all ranks, K of them real (for SigLIP: of the rank that the
# captions come from); S rows of a strip; P parts of a sum; R ranks; I identities of a row; E the shared width.

STRIP_ELEMENTS = 1 << 22  # 16 MiB: 4,096 × 512 on one core take 0.90 s, and 1.25 s in strips of 64 MiB


def strips(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of the rows, each of about `STRIP_ELEMENTS` similarities."""
    step = max(1, STRIP_ELEMENTS // max(1, num_columns))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def pair_surprisals(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, rows: GlobalRows, gather: Gather
) -> tuple[Tensor, Tensor]:
    """−log softmax of each row's own pair: its image among all captions, and its caption among all images.

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
        # In this order, because the logarithm of the whole sum would round at the size of the logits.
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
                # The gradient of a logit: both softmaxes, each times its loss's gradient, minus that of the pair.
                gradient_SK = (logits_SK - highest_M[strip, None]).exp_().mul_((by_image_M / sum_M)[strip, None])
                gradient_SK += logits_SK.sub_(highest_K).exp_().mul_(by_text_K / sum_K)
                gradient_SK.diagonal(first + strip.start).sub_(by_pair_M[strip])
                image_gradient_ME[strip] = gradient_SK @ text_KE
                text_gradient_KE.addmm_(gradient_SK.T, image_ME[strip])
        scale_gradient = (image_ME * image_gradient_ME).sum().reshape(scale.shape)
        image_gradient_BE = spread(image_gradient_ME.mul_(scale), rows.real_B)
        text_gradient_NE = spread(text_gradient_KE.mul_(scale), rows.real_N)
        return image_gradient_BE, text_gradient_NE, scale_gradient, None, None


def _join(highest_PK: Tensor, sum_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Join sums of P parts: the highest logit (K,), and the sum of exponentials relative to it (K,)."""
    highest_K = highest_PK.amax(0)
    return highest_K, (sum_PK * (highest_PK - highest_K).exp()).sum(0)


def spread(values_M: Tensor, real_B: Tensor) -> Tensor:
    """(B, …) with the values of the real rows in their places, and 0 for padding."""
    spread_B = values_M.new_zeros(len(real_B), *values_M.shape[1:])
    spread_B[real_B] = values_M
    return spread_B


# --- SigLIP -----------------------------------------------------------------------------------------------------------


def sigmoid_loss(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, logit_bias: Tensor, rows: GlobalRows, ring_shift: RingShift
) -> Tensor:
    """The loss, (). `image_BE` and `text_BE` are of unit length; `logit_scale` and `logit_bias` are (1,).

    No row needs the sum of others, so captions travel around the ring together with the gradient collected so far;
    after a whole round both are back at their rank. Memory is O(B·E) for any number of ranks. The gradient is computed
    in the forward pass, while the captions are here, so every rank must weight the loss alike.
    """
    inputs = (tensor.float() for tensor in (image_BE, text_BE, logit_scale, logit_bias))
    with torch.autocast(image_BE.device.type, enabled=False):
        loss: Tensor = _SigmoidLoss.apply(*inputs, rows, ring_shift)  # type: ignore[no-untyped-call]
    return loss


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        scale: Tensor,
        bias: Tensor,
        rows: GlobalRows,
        ring_shift: RingShift,
    ) -> Tensor:
        real_RB = rows.real_N.view(rows.num_ranks, -1)
        rank = rows.first // len(image_BE)
        image_ME = image_BE[rows.real_B]
        image_gradient_ME = torch.zeros_like(image_ME)
        travelling_2BE = torch.stack((text_BE, torch.zeros_like(text_BE)))  # captions, and the gradient of each
        loss, bias_gradient = scale.new_zeros(()), torch.zeros_like(bias)
        for hop in range(rows.num_ranks):
            real_B = real_RB[(rank - hop) % rows.num_ranks]
            text_KE = travelling_2BE[0, real_B]
            text_gradient_KE = torch.zeros_like(text_KE)
            for strip in strips(len(image_ME), len(text_KE)):
                logits_SK = torch.addmm(bias, image_ME[strip] * scale, text_KE.T)
                # −log σ(z·l) = softplus(−z·l), and its derivative by −z·l is σ(−z·l): only the sign of the pairs flips.
                pairs_S = logits_SK.diagonal(strip.start) if hop == 0 else logits_SK.new_empty(0)
                pairs_S.neg_()
                loss += torch.nn.functional.softplus(logits_SK).sum()
                gradient_SK = logits_SK.sigmoid_()
                pairs_S.neg_()
                image_gradient_ME[strip] += gradient_SK @ text_KE
                text_gradient_KE.addmm_(gradient_SK.T, image_ME[strip])
                bias_gradient += gradient_SK.sum()
            travelling_2BE[1, real_B] += text_gradient_KE
            travelling_2BE = ring_shift(travelling_2BE)
        gradients = (
            spread(image_gradient_ME * scale, rows.real_B),
            travelling_2BE[1] * scale,
            (image_ME * image_gradient_ME).sum().reshape(scale.shape),
            bias_gradient,
        )
        context.save_for_backward(*(rows.row_weight * gradient for gradient in gradients))
        return rows.row_weight * loss

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradients[0] * gradient for gradient in context.saved_tensors), None, None


# --- hard negatives ---------------------------------------------------------------------------------------------------


def draw_negatives(
    rows_BE: Tensor,
    candidates_NE: Tensor,
    logit_scale: Tensor,
    identities_BI: Tensor,
    identities_NI: Tensor,
    real_N: Tensor,
    uniform_B: Tensor,
) -> Tensor:
    """(B,) int64: for each row one of the N candidates, drawn with probability softmax_j(s·⟨x_i, y_j⟩); −1 where there
    is none (ALBEF, arXiv 2107.07651, section 3.2).

    Candidates must be real and share none of the row's identities; a row's own partner always shares one. `uniform_B`
    holds the random numbers, in (0, 1).
    """
    drawn_B = torch.full((len(rows_BE),), -1, device=rows_BE.device)
    with torch.no_grad(), torch.autocast(rows_BE.device.type, enabled=False):
        for strip in strips(len(rows_BE), len(candidates_NE)):
            logits_SN = (rows_BE[strip] * logit_scale) @ candidates_NE.T
            excluded_SN = ~real_N.expand_as(logits_SN)
            for identity_B, identity_N in zip(identities_BI.T, identities_NI.T, strict=True):
                excluded_SN |= identity_B[strip, None] == identity_N
            logits_SN.masked_fill_(excluded_SN, -torch.inf)
            # Clamped, because −∞ − −∞ is NaN where all candidates are excluded.
            highest_S1 = logits_SN.amax(1, keepdim=True).clamp(min=torch.finfo(logits_SN.dtype).min)
            weights_SN = (logits_SN - highest_S1).exp_()
            sums_SN = weights_SN.cumsum(1)
            drawn_S1 = torch.searchsorted(sums_SN, uniform_B[strip, None] * sums_SN[:, -1:], right=True)
            drawn_S1.clamp_(max=len(candidates_NE) - 1)
            # The rounding of a parallel sum can make it seem to rise at an excluded candidate.
            allowed_S1 = weights_SN.gather(1, drawn_S1) > 0
            drawn_S1 = torch.where(allowed_S1, drawn_S1, weights_SN.argmax(1, keepdim=True))
            drawn_B[strip] = torch.where(sums_SN[:, -1] > 0, drawn_S1[:, 0], -1)
    return drawn_B
