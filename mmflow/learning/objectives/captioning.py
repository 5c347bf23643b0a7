"""Captioning: the next word from the picture and the words before it (Show and Tell, arXiv 1411.4555, eq. 2).

loss = −mean over words t of log p(w_t | image, w_0 … w_{t−1})
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmflow.learning.config import CaptioningConfig
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import Gather, mean_cross_entropy

# Shapes: B rows of this rank, T tokens, V vocabulary.


def captioning(outputs: Outputs, config: CaptioningConfig) -> Tensor:
    """The objective of a batch, ()."""
    token_ids_BT = outputs.token_ids
    logits_BTV = outputs.model.decode(outputs.model.memory(outputs.image), token_ids_BT)
    places_BT = captioning_places(outputs, config)
    gather = outputs.gather_places("captioning")
    return next_token_loss(logits_BTV, token_ids_BT, places_BT, gather, config.label_smoothing)


def captioning_places(outputs: Outputs, config: CaptioningConfig) -> Tensor:
    """(B, T) bool: the words to be written."""
    return next_tokens(outputs.token_mask, outputs.rows.real_B)


def next_tokens(token_mask_BT: Tensor, real_B: Tensor) -> Tensor:
    """(B, T) bool: every token that is there but a row's first, which is given."""
    there_BT = token_mask_BT.bool() & real_B[:, None]
    return there_BT & (torch.arange(there_BT.shape[1], device=there_BT.device) > 0)


def next_token_loss(
    logits_BTV: Tensor, token_ids_BT: Tensor, there_BT: Tensor, gather: Gather, label_smoothing: float = 0.0
) -> Tensor:
    """This rank's part of the loss, (): every token of all ranks that is there, but a row's first, counts alike."""
    where = there_BT[:, 1:]
    return mean_cross_entropy(logits_BTV[:, :-1], token_ids_BT[:, 1:], where, gather, label_smoothing)
