"""InfoNCE between images and captions of a global batch (CLIP, arXiv 2103.00020, fig. 3; CPC, arXiv 1807.03748, eq. 4).

    loss = −½ · mean_i [ log softmax_j(s·⟨x_i, y_j⟩)_i + log softmax_j(s·⟨y_i, x_j⟩)_i ]

Each rank scores its own rows against the columns of all ranks. With gathered gradients, the mean over ranks of this
loss has the gradient of the one-process loss over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Shapes: B rows of this rank, N rows of all ranks, E the width of the shared space.

Gather = Callable[[Tensor], Tensor]
"""(B, …) of this rank → (N, …) of all ranks in their order, with gradients; the identity where there is one rank."""


@dataclass(frozen=True)
class GlobalRows:
    """Where this rank's rows stand in the global batch, and which rows are real rather than padding."""

    real_B: Tensor  # bool
    real_N: Tensor  # bool
    first: int  # the first of this rank's rows among the N

    @property
    def columns_B(self) -> Tensor:
        """(B,) int64: the column that belongs to each row."""
        return torch.arange(self.first, self.first + len(self.real_B), device=self.real_B.device)

    def mean(self, values_B: Tensor) -> Tensor:
        """This rank's part of the mean over all real rows: its mean over ranks is that mean. Padding counts nowhere."""
        num_ranks = len(self.real_N) // len(self.real_B)
        return values_B.masked_fill(~self.real_B, 0.0).sum() * (num_ranks / self.real_N.sum())


def global_rows(real_B: Tensor, gather: Gather, rank: int) -> GlobalRows:
    """Exchange which rows are real, once a batch."""
    return GlobalRows(real_B, gather(real_B.to(torch.uint8)).bool(), rank * len(real_B))


def similarities(rows_BE: Tensor, columns_NE: Tensor, logit_scale: Tensor, real_N: Tensor) -> Tensor:
    """(B, N) scaled cosines; columns of padding are the lowest finite number, so that softmax gives them nothing."""
    logits_BN = logit_scale * rows_BE @ columns_NE.T
    return logits_BN.masked_fill(~real_N, torch.finfo(logits_BN.dtype).min)


def contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    rows: GlobalRows,
    gather: Gather,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss, (). `image_BE` and `text_BE` are of unit length; `logit_scale` (1,) multiplies their cosines."""
    image_NE, text_NE = gather(image_BE), gather(text_BE)
    per_row_B = 0.5 * (
        _cross_entropy(similarities(image_BE, text_NE, logit_scale, rows.real_N), rows, label_smoothing)
        + _cross_entropy(similarities(text_BE, image_NE, logit_scale, rows.real_N), rows, label_smoothing)
    )
    return rows.mean(per_row_B)


def _cross_entropy(logits_BN: Tensor, rows: GlobalRows, label_smoothing: float) -> Tensor:
    log_probability_BN = logits_BN.float().log_softmax(dim=-1)
    right_B = log_probability_BN.gather(1, rows.columns_B[:, None]).squeeze(1)
    if not label_smoothing:
        return -right_B
    all_B = log_probability_BN.masked_fill(~rows.real_N, 0.0).sum(-1) / rows.real_N.sum()
    return -(1 - label_smoothing) * right_B - label_smoothing * all_B
