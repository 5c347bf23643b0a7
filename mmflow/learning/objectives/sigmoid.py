"""The sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2), which judges each pair of the global batch on its own.

loss = −(1/n) Σ_i Σ_j log σ(z_ij · (s·⟨x_i, y_j⟩ + b)),   z_ij = 1 for a pair, −1 otherwise
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mmflow.learning import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs

SHARED_SPACE = {"embeddings": "give the model a text encoder and an embedding_width, and no video of kind tight"}


class Sigmoid(Objective):
    """SigLIP's loss over all pairs of the global batch. The model needs a `bias`."""

    TRAINS: ClassVar = {"embedding_width": {}, "bias": {}}
    COMPARES_ROWS: ClassVar = True

    def needs(self) -> dict[str, str]:
        return SHARED_SPACE | {"bias": "give the model a bias (SigLIP's is -10)"}

    def loss(self, outputs: Outputs) -> Tensor:
        from mmflow.learning.pair_losses import sigmoid_loss

        scale, bias = outputs.scale
        assert bias is not None, "needs() names it"
        embeddings = outputs.image_embedding, outputs.text_embedding
        return sigmoid_loss(*embeddings, scale, bias, outputs.rows, outputs.ranks.ring_shift)
