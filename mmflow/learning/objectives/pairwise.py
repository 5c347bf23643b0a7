"""The contrast of scores that a model gives pair by pair, rather than as products of embeddings: CLIP4Clip's tight
similarity (arXiv 2104.08860, equations 7 to 9, over the scores of its section 3.3).

    loss = −½ · mean_i [ log softmax_j(s(y_i, x_j))_i + log softmax_j(s(y_j, x_i))_i ]

A score is a forward of the model, so a rank scores its own clips alone with the captions of all ranks: no pair is read
twice, and what a caption is worth among all clips is joined from the ranks' sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, R ranks.


def pair_score_loss(scores_NB: Tensor, rows: GlobalRows, gather: Gather, label_smoothing: float = 0.0) -> Tensor:
    """This rank's part of the loss, (), from the score of each caption of all ranks with each clip of this one."""
    scores_NB = scores_NB.float()
    own_B = scores_NB[rows.columns_B, torch.arange(len(rows.real_B), device=scores_NB.device)]
    # The lowest number and not −∞: a rank whose clips are all padding has a sum of nothing, and its slope is no number.
    barred = ~(rows.real_N[:, None] & rows.real_B)
    scores_NB = scores_NB.masked_fill(barred, torch.finfo(torch.float32).min)
    by_clip_B = scores_NB.logsumexp(0) - own_B
    by_caption_B = gather(scores_NB.logsumexp(1)[None]).logsumexp(0)[rows.columns_B] - own_B
    per_row_B = 0.5 * (by_clip_B + by_caption_B)
    if label_smoothing:
        # As in `contrastive`: the pair's score less the mean of all candidates' is what smoothing adds.
        scores_NB = scores_NB.masked_fill(barred, 0.0)
        num_rows = rows.real_N.sum().clamp(min=1)
        over_captions_B = scores_NB.sum(0) / num_rows
        over_clips_B = gather(scores_NB.sum(1)[None]).sum(0)[rows.columns_B] / num_rows
        per_row_B = per_row_B + label_smoothing * (own_B - 0.5 * over_captions_B - 0.5 * over_clips_B)
    return rows.mean(per_row_B)
