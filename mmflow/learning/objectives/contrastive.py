"""InfoNCE between images and captions of a global batch (CLIP, arXiv 2103.00020, fig. 3; CPC, arXiv 1807.03748, eq. 4).

    loss = −½ · mean_i [ log softmax_j(s·⟨x_i, y_j⟩)_i + log softmax_j(s·⟨y_i, x_j⟩)_i ]

Label smoothing ε takes (1 − ε) of the target to the pair and spreads ε over all candidates (arXiv 1512.00567, section
7). Clips in place of images make it the video–text contrast (CLIP4Clip, arXiv 2104.08860, eq. 7–9).
"""

from __future__ import annotations

from torch import Tensor

from mmflow.learning.config import ContrastiveConfig
from mmflow.learning.objectives.pairwise import pair_score_loss
from mmflow.learning.objectives.tiled import pair_surprisals
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, E the width of the shared space.


def contrastive(outputs: Outputs, config: ContrastiveConfig) -> Tensor:
    """The objective of a batch, (). A model that scores pairs reads each of the global batch."""
    if "pair_scores" in outputs.model.gives:
        return pair_score_loss(outputs.pair_scores, outputs.rows, outputs.gather, config.label_smoothing)
    scale, _ = outputs.scale
    embeddings = outputs.image_embedding, outputs.text_embedding
    return contrastive_loss(*embeddings, scale, outputs.rows, outputs.gather, config.label_smoothing)


def contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    rows: GlobalRows,
    gather: Gather,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss, (). `image_BE` and `text_BE` are of unit length; `logit_scale` (1,) multiplies their cosines."""
    by_image_B, by_text_B = pair_surprisals(image_BE, text_BE, logit_scale, rows, gather)
    per_row_B = 0.5 * (by_image_B + by_text_B)
    if label_smoothing:
        image_BE, text_BE = image_BE.float(), text_BE.float()
        # A row's mean logit is its product with the mean column: no matrix is needed. The pair's logit less that mean
        # is what smoothing adds, because −Σ_j log p_j / n = −log p_i + (logit_i − Σ_j logit_j / n).
        mean_image_E, mean_text_E = _mean_row(image_BE, rows, gather), _mean_row(text_BE, rows, gather)
        over_mean_B = image_BE * (text_BE - 0.5 * mean_text_E) - 0.5 * text_BE * mean_image_E
        per_row_B = per_row_B + label_smoothing * logit_scale * over_mean_B.sum(-1)
    return rows.mean(per_row_B)


def _mean_row(rows_BE: Tensor, rows: GlobalRows, gather: Gather) -> Tensor:
    """(E,): the mean of the real rows of all ranks."""
    sum_1E = rows_BE.masked_fill(~rows.real_B[:, None], 0.0).sum(0, keepdim=True)
    return gather(sum_1E).sum(0) / rows.real_N.sum().clamp(min=1)
