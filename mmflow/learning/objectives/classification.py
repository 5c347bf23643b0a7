"""Classification: the cross-entropy of the right label, smoothed where asked (arXiv 1512.00567, section 7).

loss = mean over labelled rows of −Σ_c q_c log p_c,   q = (1 − ε) · right + ε / C
"""

from __future__ import annotations

from torch import Tensor

from mmflow.learning.config import ClassificationConfig
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import mean_cross_entropy

# Shapes: B rows of this rank, C classes.


def classification(outputs: Outputs, config: ClassificationConfig) -> Tensor:
    """The objective of a batch, (). A row whose label is −1, unknown, counts nowhere."""
    logits_BC = outputs.model.class_logits(outputs.fused)
    known_B, gather = classification_places(outputs, config), outputs.gather_places("classification")
    return mean_cross_entropy(logits_BC, outputs.target("label"), known_B, gather, config.label_smoothing)


def classification_places(outputs: Outputs, config: ClassificationConfig) -> Tensor:
    """(B,) bool: the labels that are known."""
    return outputs.rows.real_B & (outputs.target("label") >= 0)
