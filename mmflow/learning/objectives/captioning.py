"""Captioning: predict the next word from the image and the words before it (Show and Tell, arXiv 1411.4555, eq. 2).

loss = −mean over words t of log p(w_t | image, w_0 … w_{t−1})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmflow.learning import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs
    from mmflow.learning.rows import Gather

# Shapes: B rows of this rank, T tokens, V vocabulary.


class Captioning(Objective):
    """Write the caption word by word, from the image and the words before."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over the vocabulary."""

    TRAINS: ClassVar = {"decoder": {}}

    def needs(self) -> dict[str, str]:
        return {
            "decoded": "give the model a decoder",
            "decoded from the image": "set the model's decoder.memory to image",
        }

    def places(self, outputs: Outputs) -> Tensor:
        """(B, T) bool: the words to predict."""
        return predicted_tokens(outputs.token_mask, outputs.rows.real_B)

    def loss(self, outputs: Outputs) -> Tensor:
        logits_BTV = outputs.model.decode(outputs.model.memory(outputs.image), outputs.token_ids)
        gather = outputs.gather_places("captioning")
        return next_token_loss(logits_BTV, outputs.token_ids, self.places(outputs), gather, self.label_smoothing)


def predicted_tokens(token_mask_BT: Tensor, real_B: Tensor) -> Tensor:
    """(B, T) bool: every real token except the first of a row, which is given."""
    predicted_BT = token_mask_BT.bool() & real_B[:, None]
    predicted_BT[:, 0] = False
    return predicted_BT


def next_token_loss(
    logits_BTV: Tensor, token_ids_BT: Tensor, predicted_BT: Tensor, gather: Gather, label_smoothing: float = 0.0
) -> Tensor:
    """This rank's part of the loss, (). Each predicted token of all ranks counts the same, whatever its row."""
    from mmflow.learning.rows import mean_cross_entropy

    return mean_cross_entropy(
        logits_BTV[:, :-1], token_ids_BT[:, 1:], predicted_BT[:, 1:], gather, label_smoothing=label_smoothing
    )
