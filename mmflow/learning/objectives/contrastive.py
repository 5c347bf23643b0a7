"""InfoNCE between the images and captions of a global batch (CLIP, arXiv 2103.00020, fig. 3; CPC, arXiv 1807.03748,
eq. 4).

    loss = −½ · mean_i [ log softmax_j(s·⟨x_i, y_j⟩)_i + log softmax_j(s·⟨y_i, x_j⟩)_i ]

Label smoothing ε gives (1 − ε) of the target to the pair and spreads ε over all candidates (arXiv 1512.00567, section
7). With clips in place of images it is the video–text contrast (CLIP4Clip, arXiv 2104.08860, eq. 7–9).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmflow.learning import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs
    from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, E the width of the shared space.


class Contrastive(Objective):
    """InfoNCE over the global batch; for clips the video–text contrast."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all candidates."""

    TRAINS: ClassVar = {"embedding_width": {}}
    COMPARES_ROWS: ClassVar = True

    def needs(self) -> dict[str, str]:
        return {"embeddings or pair_scores": "give the model a text encoder and an embedding_width"}

    def loss(self, outputs: Outputs) -> Tensor:
        rows, gather, smoothing = outputs.rows, outputs.ranks.gather, self.label_smoothing
        if "pair_scores" in outputs.model.gives:
            return pair_score_loss(outputs.pair_scores, rows, gather, smoothing)
        return contrastive_loss(*outputs.embeddings, rows, gather, smoothing)


def contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    rows: GlobalRows,
    gather: Gather,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss, (). `image_BE` and `text_BE` are of unit length; `logit_scale` (1,) multiplies their cosines."""
    from mmflow.learning.pair_losses import pair_surprisals

    by_image_B, by_text_B = pair_surprisals(image_BE, text_BE, logit_scale, rows, gather)
    per_row_B = 0.5 * (by_image_B + by_text_B)
    if label_smoothing:
        image_BE, text_BE = image_BE.float(), text_BE.float()
        # A row's mean logit is its product with the mean column, which needs no matrix. Smoothing adds the pair's logit
        # minus that mean, because −Σ_j log p_j / n = −log p_i + (logit_i − Σ_j logit_j / n).
        mean_image_E, mean_text_E = _mean_row(image_BE, rows, gather), _mean_row(text_BE, rows, gather)
        over_mean_B = image_BE * (text_BE - 0.5 * mean_text_E) - 0.5 * text_BE * mean_image_E
        per_row_B = per_row_B + label_smoothing * logit_scale * over_mean_B.sum(-1)
    return rows.mean(per_row_B)


def pair_score_loss(scores_NB: Tensor, rows: GlobalRows, gather: Gather, label_smoothing: float = 0.0) -> Tensor:
    """This rank's part of the loss, (), from the score of each caption of all ranks with each clip of this rank: the
    contrast of scores that a model computes pair by pair (CLIP4Clip's tight similarity, section 3.3).

    A score is a forward pass of the model, so a rank scores only its own clips, and no pair is computed twice. The sum
    over all clips that a caption needs is joined from the ranks' sums.
    """
    import torch

    scores_NB = scores_NB.float()
    own_B = scores_NB[rows.columns_B, torch.arange(len(rows.real_B), device=scores_NB.device)]
    # The lowest finite number and not −∞: on a rank with only padding the gradient of an empty sum would be NaN.
    masked = ~(rows.real_N[:, None] & rows.real_B)
    scores_NB = scores_NB.masked_fill(masked, torch.finfo(torch.float32).min)
    by_clip_B = scores_NB.logsumexp(0) - own_B
    by_caption_B = gather(scores_NB.logsumexp(1)[None]).logsumexp(0)[rows.columns_B] - own_B
    per_row_B = 0.5 * (by_clip_B + by_caption_B)
    if label_smoothing:
        # As in `contrastive_loss`: smoothing adds the pair's score minus the mean score of all candidates.
        scores_NB = scores_NB.masked_fill(masked, 0.0)
        num_rows = rows.real_N.sum().clamp(min=1)
        over_captions_B = scores_NB.sum(0) / num_rows
        over_clips_B = gather(scores_NB.sum(1)[None]).sum(0)[rows.columns_B] / num_rows
        per_row_B = per_row_B + label_smoothing * (own_B - 0.5 * over_captions_B - 0.5 * over_clips_B)
    return rows.mean(per_row_B)


def _mean_row(rows_BE: Tensor, rows: GlobalRows, gather: Gather) -> Tensor:
    """(E,): the mean of the real rows of all ranks."""
    sum_1E = rows_BE.masked_fill(~rows.real_B[:, None], 0.0).sum(0, keepdim=True)
    return gather(sum_1E).sum(0) / rows.real_N.sum().clamp(min=1)
