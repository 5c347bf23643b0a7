"""Image–text matching (ALBEF, arXiv 2107.07651, eq. 4).

    loss = mean over pairs (I, T) of H(y, p(I, T)),   y whether the caption belongs to the image

The pairs are those of the batch, for each image one wrong caption, and for each caption one wrong image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mmflow.learning import Objective
from mmflow.learning.objectives.sigmoid import SHARED_SPACE

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs
    from mmflow.learning.rows import Gather

# Shapes: B rows of this rank, N rows to draw from, I identities of a row, E the width of the shared space.


class Matching(Objective):
    """Does this caption belong to this image? Asked of each pair, and for each side of it with one wrong partner."""

    negatives: Literal["hard", "uniform"] = "hard"
    """How wrong partners are drawn: similar ones more often (ALBEF), which needs embeddings, or all equally often. Use
    uniform from scratch: a head begins to tell 256 pairs apart after 50 steps, and with hard after 110."""
    pool: Literal["batch", "rank"] = "batch"
    """Where they are drawn from: the whole global batch, which gathers every rank's sequences and gives the same result
    for any number of ranks; or this rank's part of it, which moves nothing."""

    TRAINS: ClassVar = {"matching": {}}
    WHOLE_BATCH: ClassVar = "matching fuses each image with a caption of another row"

    def needs(self) -> dict[str, str]:
        needs = {"fused": "give the model a fusion", "matching_logits": "add matching to the model's heads"}
        return needs | (SHARED_SPACE if self.negatives == "hard" else {})

    def over_all_ranks(self) -> Matching:
        return self.model_copy(update={"pool": "batch"})

    def loss(self, outputs: Outputs) -> Tensor:
        import torch

        from mmflow.learning.outputs import gather_encoded, select_rows

        assert outputs.text is not None, "needs() names a fusion"
        model, real_B, device = outputs.model, outputs.rows.real_B, outputs.rows.real_B.device
        if self.pool == "batch":
            gather, own_B, real_N = outputs.ranks.gather, outputs.rows.columns_B, outputs.rows.real_N
        else:
            gather, own_B, real_N = (lambda rows: rows), torch.arange(len(real_B), device=device), real_B
        wrong_text_B, wrong_image_B = self.wrong_partners(outputs, gather, real_N)
        images, texts = gather_encoded(outputs.image, gather), gather_encoded(outputs.text, gather)
        fused = model.fuse(
            select_rows(images, torch.cat((own_B, wrong_image_B))), select_rows(texts, torch.cat((wrong_text_B, own_B)))
        )
        logits = torch.cat((model.matching_logits(outputs.fused), model.matching_logits(fused)))
        belongs = torch.arange(len(logits), device=device) < len(real_B)
        has_partner = torch.cat((real_B, real_B & (wrong_text_B >= 0), real_B & (wrong_image_B >= 0)))
        return outputs.mean_cross_entropy("matching", logits, belongs.long(), has_partner)

    def wrong_partners(self, outputs: Outputs, gather: Gather, real_N: Tensor) -> tuple[Tensor, Tensor]:
        """For each image a caption and for each caption an image, (B,) int64 each, −1 where there is none."""
        import torch

        from mmflow.learning.pair_losses import draw_negatives

        rows = outputs.rows
        if self.negatives == "hard":
            image_BE, text_BE = outputs.image_embedding.detach(), outputs.text_embedding.detach()
            scale = outputs.scale.logit_scale.detach()
        else:
            scale = torch.ones(1, device=rows.real_B.device)
            image_BE = text_BE = scale.new_zeros(len(rows.real_B), 1)  # equal similarities are drawn equally often
        identities_BI = outputs.identities
        identities_NI = gather(identities_BI)
        to_text_B, to_image_B = outputs.draw_uniform(2).unbind(1)
        shared = scale, identities_BI, identities_NI, real_N
        wrong_text_B = draw_negatives(image_BE, gather(text_BE), *shared, to_text_B)
        return wrong_text_B, draw_negatives(text_BE, gather(image_BE), *shared, to_image_B)
