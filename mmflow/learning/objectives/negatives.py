"""Wrong partners for matching, drawn from the batch by likeness (ALBEF, arXiv 2107.07651, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmflow.learning.objectives.tiled import strips

# Shapes: B rows of this rank, N candidates, S rows of a strip, I identities of a row, E the width of the shared space.


def draw_negatives(
    rows_BE: Tensor,
    candidates_NE: Tensor,
    logit_scale: Tensor,
    identities_BI: Tensor,
    identities_NI: Tensor,
    real_N: Tensor,
    uniform_B: Tensor,
) -> Tensor:
    """(B,) int64: for each row one of the N, with probability softmax_j(s·⟨x_i, y_j⟩); −1 where none may be.

    A candidate may be when it is real and shares none of the row's identities, which its own partner always does.
    `uniform_B` in (0, 1) decides.
    """
    drawn_B = torch.full((len(rows_BE),), -1, device=rows_BE.device)
    with torch.no_grad(), torch.autocast(rows_BE.device.type, enabled=False):
        for strip in strips(len(rows_BE), len(candidates_NE)):
            logits_SN = (rows_BE[strip] * logit_scale) @ candidates_NE.T
            barred_SN = ~real_N.expand_as(logits_SN)
            for of_row_B, of_candidate_N in zip(identities_BI.T, identities_NI.T, strict=True):
                barred_SN |= of_row_B[strip, None] == of_candidate_N
            logits_SN.masked_fill_(barred_SN, -torch.inf)
            # Where all are barred the highest is −∞, and −∞ less itself no number.
            highest_S1 = logits_SN.amax(1, keepdim=True).clamp(min=torch.finfo(logits_SN.dtype).min)
            weights_SN = (logits_SN - highest_S1).exp_()
            sums_SN = weights_SN.cumsum(1)
            found_S1 = torch.searchsorted(sums_SN, uniform_B[strip, None] * sums_SN[:, -1:], right=True)
            found_S1.clamp_(max=len(candidates_NE) - 1)
            # A parallel sum may round so that it seems to rise at a barred candidate.
            sound_S1 = weights_SN.gather(1, found_S1) > 0
            found_S1 = torch.where(sound_S1, found_S1, weights_SN.argmax(1, keepdim=True))
            drawn_B[strip] = torch.where(sums_SN[:, -1] > 0, found_S1[:, 0], -1)
    return drawn_B
