"""Layer-wise learning-rate decay (ELECTRA, arXiv 2003.10555, appendix A; BEiT): lower layers learn more slowly."""

from __future__ import annotations

from torch import nn

from mmflow.models.depth import depths
from mmflow.models.encoders import Encoder


def learning_rate_factors(module: nn.Module) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by, by the name it has in `module`; 1 for those not named.

    A backbone of L layers: `layer_decay` ** (L + 1 - depth), depth 0 for the embeddings, 1 … L for the layers and
    L + 1 for what follows. What is not a backbone (projections, fusion, heads) learns at the full rate.
    """
    factors: dict[str, float] = {}
    for name, part in module.named_modules():
        if isinstance(part, Encoder) and part.layer_decay != 1:
            prefix = f"{name}.backbone." if name else "backbone."
            deep, deepest = depths(f"{name or 'encoder'}.layer_decay", part.backbone)
            factors |= {prefix + each: part.layer_decay ** (deepest - depth) for each, depth in deep.items()}
    return {name: factor for name, factor in factors.items() if factor != 1}
