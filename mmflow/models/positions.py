"""Learned positions made to fit: stretched for longer text, resampled for other picture sizes, counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError

# Shapes: P positions, W width, h and w rows and columns of patches.


def stretched(positions_PW: Tensor, keep: int, factor: int) -> Tensor:
    """Long-CLIP's positions (arXiv 2403.15378, section 3.1 and equation 2): (keep + (P - keep) · factor, W).

    The first `keep` stay; after them each interval is cut in `factor`, linearly, and the last one continued.
    """
    num_positions = len(positions_PW)
    place_P = keep + torch.arange((num_positions - keep) * factor, device=positions_PW.device) / factor
    # The last positions have no right neighbour: they continue the line of the two before them.
    left_P = place_P.long().clamp(max=num_positions - 2)
    share_P1 = (place_P - left_P).unsqueeze(1).to(positions_PW.dtype)
    between_PW = torch.lerp(positions_PW[left_P], positions_PW[left_P + 1], share_P1)
    return torch.cat([positions_PW[:keep], between_PW])


def stretch_text(key: str, backbone: Any, keep: int, factor: int) -> None:
    """Stretch a text backbone's learned positions in place. Raises RecipeError naming `key` where it has none to
    stretch."""
    table = _text_table(backbone)
    model_type = backbone.config.model_type
    if table is None:
        raise RecipeError(
            f"{key}: {model_type} has no learned absolute positions; leave it out, and raise max_tokens up to its "
            "max_position_embeddings"
        )
    name, offset = table
    embeddings = backbone.embeddings
    rows_PW = getattr(embeddings, name).weight.detach()
    if keep > len(rows_PW) - offset - 2:
        raise RecipeError(
            f"{key}.keep: {keep} of {len(rows_PW) - offset} positions leaves fewer than two to interpolate between; "
            "give a smaller number"
        )
    longer_PW = torch.cat([rows_PW[:offset], stretched(rows_PW[offset:], keep, factor)])
    longer = nn.Embedding(len(longer_PW), longer_PW.shape[1], getattr(embeddings, name).padding_idx)
    longer.weight.data.copy_(longer_PW)
    setattr(embeddings, name, longer)
    for buffer, values in (("position_ids", torch.arange(len(longer_PW))), ("token_type_ids", None)):
        if hasattr(embeddings, buffer):
            row_1P = torch.zeros(1, len(longer_PW), dtype=torch.int64) if values is None else values[None]
            embeddings.register_buffer(buffer, row_1P, persistent=False)
    backbone.config.max_position_embeddings = len(longer_PW)


def num_positions(backbone: Any) -> int | None:
    """How many tokens a text backbone can read: its learned positions, less those that stand for padding (RoBERTa's
    count from pad + 1), or what its configuration states; None where nothing bounds it."""
    table = _text_table(backbone)
    if table is None:
        return getattr(backbone.config, "max_position_embeddings", None)
    name, offset = table
    return int(getattr(backbone.embeddings, name).num_embeddings) - offset


def _text_table(backbone: Any) -> tuple[str, int] | None:
    # The name of the table within `embeddings`, and how many of its first rows no token uses.
    for name in ("position_embeddings", "position_embedding"):
        table = getattr(getattr(backbone, "embeddings", None), name, None)
        if isinstance(table, nn.Embedding):
            return name, 0 if table.padding_idx is None else table.padding_idx + 1
    return None


def resampled(positions_PW: Tensor, old_side: int, new_side: int) -> Tensor:
    """The positions of a grid of `old_side`² patches for one of `new_side`², bicubic as ViT (arXiv 2010.11929, section
    3.2) and DINOv2 do it. What stands before the grid (the class token) stays."""
    prefix = len(positions_PW) - old_side**2
    grid_1Whw = positions_PW[prefix:].T.reshape(1, -1, old_side, old_side)
    grid_1Whw = nn.functional.interpolate(grid_1Whw, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return torch.cat([positions_PW[:prefix], grid_1Whw.flatten(2)[0].T])
