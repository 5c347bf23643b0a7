"""Image–text matching (ALBEF, arXiv 2107.07651, eq. 4).

    loss = mean over pairs (I, T) of H(y, p(I, T)),   y whether the caption belongs to the image

The pairs are those of the batch, for each image a wrong caption, and for each caption a wrong image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmflow.learning.chance import draw_seed, fingerprint, uniform
from mmflow.learning.config import MatchingConfig
from mmflow.learning.objectives.negatives import draw_negatives
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import Gather, mean_cross_entropy
from mmflow.models.encoders import Encoded

# Shapes: B rows of this rank, N rows to draw from, T tokens, I identities of a row, E the width of the shared space.


def matching(outputs: Outputs, config: MatchingConfig) -> Tensor:
    """The objective of a batch, (). Rows of one caption or one key are never each other's wrong partners."""
    assert outputs.text is not None, "check() has seen that the model fuses"
    model, real_B, device = outputs.model, outputs.rows.real_B, outputs.rows.real_B.device
    everywhere = config.pool == "batch"
    gather = outputs.gather if everywhere else _stay
    own_B = outputs.rows.columns_B if everywhere else torch.arange(len(real_B), device=device)
    real_N = outputs.rows.real_N if everywhere else real_B
    wrong_text_B, wrong_image_B = _wrong_partners(outputs, config, gather, real_N)
    images, texts = joined(outputs.image, gather), joined(outputs.text, gather)
    fused = model.fuse(
        chosen_rows(images, torch.cat((own_B, wrong_image_B))), chosen_rows(texts, torch.cat((wrong_text_B, own_B)))
    )
    logits = torch.cat((model.matching_logits(outputs.fused), model.matching_logits(fused)))
    belongs = torch.arange(len(logits), device=device) < len(real_B)
    there = torch.cat((real_B, real_B & (wrong_text_B >= 0), real_B & (wrong_image_B >= 0)))
    return mean_cross_entropy(logits, belongs.long(), there, outputs.gather)


def _wrong_partners(outputs: Outputs, config: MatchingConfig, gather: Gather, real_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each image a caption and for each caption an image, (B,) int64 each, −1 where there is none."""
    rows = outputs.rows
    if config.negatives == "hard":
        embeddings = outputs.image_embedding.detach(), outputs.text_embedding.detach()
        scale = outputs.scale.logit_scale.detach()
    else:
        scale = torch.ones(1, device=rows.real_B.device)
        embeddings = (scale.new_zeros(len(rows.real_B), 1),) * 2  # all alike, so all as likely
    identities_BI = torch.stack((fingerprint(outputs.token_ids, outputs.token_mask), outputs.key_hashes), 1)
    identities_NI = gather(identities_BI)
    chance_B2 = uniform(draw_seed(outputs.generator), rows.columns_B, 2)
    wrong_text_B, wrong_image_B = (
        draw_negatives(here_BE, gather(there_BE), scale, identities_BI, identities_NI, real_N, chance_B)
        for here_BE, there_BE, chance_B in zip(embeddings, embeddings[::-1], chance_B2.T, strict=True)
    )
    return wrong_text_B, wrong_image_B


def _stay(rows: Tensor) -> Tensor:
    """What gathers from this rank alone."""
    return rows


def joined(encoded: Encoded, gather: Gather) -> Encoded:
    """The rows of all ranks, their sequences padded to the longest of any."""
    sequence_BTW, mask_BT = encoded.sequence_BTW, encoded.mask_BT
    length = sequence_BTW.shape[1]
    more = int(gather(torch.tensor([length], device=sequence_BTW.device)).max()) - length
    # Regions carry no mask where every picture has as many.
    mask_NT = None if mask_BT is None else gather(pad(mask_BT.to(torch.uint8), (0, more))).bool()
    return Encoded(gather(pad(sequence_BTW, (0, 0, 0, more))), gather(encoded.pooled_BW), mask_NT)


def chosen_rows(encoded: Encoded, chosen_C: Tensor) -> Encoded:
    """The rows of these numbers (C,), in their order."""
    mask_BT = encoded.mask_BT
    return Encoded(
        encoded.sequence_BTW[chosen_C], encoded.pooled_BW[chosen_C], None if mask_BT is None else mask_BT[chosen_C]
    )
