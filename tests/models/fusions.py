"""Random encodings and every fusion, for its tests."""

from __future__ import annotations

import torch

from mmflow.models.config import FusionConfig
from mmflow.models.encoders import Encoded
from mmflow.models.fusion import Fusion, build_fusion

TEXT_WIDTH, IMAGE_WIDTH, WIDTH, HEADS = 8, 12, 16, 2
ATTENDING = ("cross_attention", "both_directions", "co_attention", "single_stream")
KINDS = ("concatenation", "gated", *ATTENDING)
ALL = frozenset({"text", "image", "pooled"})


def fusion(kind: str, reads: frozenset[str] = ALL, layers: int = 2) -> Fusion:
    """Fresh weights with norms and biases that are not those of a fresh one, in evaluation mode."""
    attends = {"layers": layers, "heads": HEADS} if kind in ATTENDING else {}
    config = FusionConfig.model_validate({"kind": kind, "width": WIDTH, **attends})
    torch.manual_seed(3)
    made = build_fusion("model.fusion", config, IMAGE_WIDTH, TEXT_WIDTH, reads)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def encodings(batch: int = 4, tokens: int = 6, regions: int = 5, seed: int = 0) -> tuple[Encoded, Encoded]:
    """Image and text; row b of the text has b tokens of padding."""
    random = torch.Generator().manual_seed(seed)
    mask_BT = torch.arange(tokens) < tokens - torch.arange(batch)[:, None]
    image = Encoded(
        torch.randn(batch, regions, IMAGE_WIDTH, generator=random), torch.randn(batch, IMAGE_WIDTH, generator=random)
    )
    text = Encoded(
        torch.randn(batch, tokens, TEXT_WIDTH, generator=random),
        torch.randn(batch, TEXT_WIDTH, generator=random),
        mask_BT,
    )
    return image, text
