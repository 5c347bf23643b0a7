"""Captioning: the next word from the picture and the words before it (Show and Tell, arXiv 1411.4555, eq. 2).

loss = −mean over words t of log p(w_t | image, w_0 … w_{t−1})
"""

from __future__ import annotations

from torch import Tensor

from mmflow.objectives.config import CaptioningConfig
from mmflow.objectives.outputs import Outputs
from mmflow.objectives.rows import Gather, mean_cross_entropy

# Shapes: B rows of this rank, T tokens, V vocabulary.


def captioning(outputs: Outputs, config: CaptioningConfig) -> Tensor:
    """The objective of a batch, ()."""
    token_ids_BT = outputs.token_ids
    logits_BTV = outputs.model.decode(outputs.model.memory(outputs.image), token_ids_BT)
    there_BT = outputs.token_mask.bool() & outputs.rows.real_B[:, None]
    return next_token_loss(logits_BTV, token_ids_BT, there_BT, outputs.gather, config.label_smoothing)


def next_token_loss(
    logits_BTV: Tensor, token_ids_BT: Tensor, there_BT: Tensor, gather: Gather, label_smoothing: float = 0.0
) -> Tensor:
    """This rank's part of the loss, (): every token of all ranks that is there, but a row's first, counts alike."""
    where = there_BT[:, 1:]
    return mean_cross_entropy(logits_BTV[:, :-1], token_ids_BT[:, 1:], where, gather, label_smoothing)
