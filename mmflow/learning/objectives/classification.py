"""Classification: the cross-entropy of the right label, with label smoothing (arXiv 1512.00567, section 7).

loss = mean over labelled rows of −Σ_c q_c log p_c,   q = (1 − ε) · right + ε / C
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmflow.learning import Objective
from mmflow.loading.config import LoaderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs

# Shapes: B rows of this rank, C classes.

CLASS_HEAD = {"class_logits": "add classes to the model's heads"}


class Classification(Objective):
    """The label of the image or, with a fusion, of the pair."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""

    TRAINS: ClassVar = {"classes": {}}

    def needs(self) -> dict[str, str]:
        return CLASS_HEAD

    def missing_target(self, loader: LoaderConfig) -> str | None:
        return "label to the name of a class in the samples' metadata" if loader.label is None else None

    def places(self, outputs: Outputs) -> Tensor:
        """(B,) bool: the rows with a known label; −1 is unknown."""
        return outputs.rows.real_B & (outputs.target("label") >= 0)

    def loss(self, outputs: Outputs) -> Tensor:
        logits_BC = outputs.model.class_logits(outputs.fused)
        return outputs.mean_cross_entropy(
            "classification", logits_BC, outputs.target("label"), self.places(outputs), self.label_smoothing
        )
