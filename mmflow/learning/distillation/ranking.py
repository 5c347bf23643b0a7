"""The order of hard negatives, from a teacher that reads image and caption together to a student that compares vectors
(after CPRD, arXiv 2407.07479). How much likelier one wrong partner is than another means little across the two kinds of
model; which of them is likelier does.

    loss = −½ · mean_i [ mean_k log( exp z_ik / Σ_{l ≥ k} exp z_il ) of captions + the same of images ]

z_i1 … z_iK are the student's scaled cosines of row i with its K hardest wrong partners, in the teacher's order: the
negative log-likelihood of that order (ListMLE). The last of an order has nothing below it, and counts nowhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmflow.learning.distillation.loss import (
    DistillationBatch,
    DistillationLoss,
    ModelTraits,
    no_embeddings,
    scaled_products,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs

# Shapes: B rows of this rank, N rows of all ranks, K hard negatives of a row, E the width of the shared space.


class Ranking(DistillationLoss):
    """The order in which a teacher with a fusion puts the hardest wrong partners of each image and caption."""

    negatives: int = Field(4, ge=2)
    """How many are ordered; the teacher reads this many pairs for each row and side."""

    NEEDS_TEACHER_MODEL: ClassVar = True

    def missing(self, student: ModelTraits, teacher: ModelTraits) -> str | None:
        if "matching_logits" not in teacher.gives:
            return "the teacher has no matching_logits; use a teacher with a fusion and the head matching"
        return no_embeddings("student", student)

    def loss(self, batch: DistillationBatch) -> Tensor:
        """Rows with one caption or one key are never each other's wrong partners."""
        outputs = batch.student
        rows, gather = outputs.rows, outputs.ranks.gather
        image_BE, text_BE, logit_scale = outputs.embeddings
        identities_BI = outputs.identities
        same_BN = (identities_BI[:, None] == gather(identities_BI)).any(-1)
        allowed_BN = rows.real_N & ~same_BN
        num_negatives = min(self.negatives, len(rows.real_N))
        total_B = rows.zeros()
        for of_images, (anchors_BE, candidates_BE) in ((True, (image_BE, text_BE)), (False, (text_BE, image_BE))):
            logits_BN = scaled_products(anchors_BE, gather(candidates_BE), logit_scale.float(), allowed_BN)
            hardest_BK = logits_BN.detach().topk(num_negatives, dim=1).indices
            student_BK, allowed_BK = logits_BN.gather(1, hardest_BK), allowed_BN.gather(1, hardest_BK)
            for teacher in batch.teachers:
                teacher_BK = matching_odds(teacher.live, hardest_BK, of_images=of_images)
                total_B = total_B + teacher.share * order_surprisal(student_BK, teacher_BK, allowed_BK)
        return rows.mean(0.5 * total_B)


def order_surprisal(student_BK: Tensor, teacher_BK: Tensor, allowed_BK: Tensor) -> Tensor:
    """(B,) −log likelihood of the teacher's order under the student's scores: the mean over those that have another
    below them; 0 where fewer than two are allowed."""
    import torch

    order_BK = teacher_BK.masked_fill(~allowed_BK, -torch.inf).argsort(dim=1, descending=True, stable=True)
    allowed_BK = allowed_BK.gather(1, order_BK)  # the others come last
    scores_BK = student_BK.gather(1, order_BK).masked_fill(~allowed_BK, torch.finfo(student_BK.dtype).min)
    below_BK = scores_BK.flip(1).logcumsumexp(1).flip(1)
    counts_B = (allowed_BK.sum(1) - 1).clamp(min=0)
    places_K = torch.arange(allowed_BK.shape[1], device=allowed_BK.device)
    surprisals_BK = (below_BK - scores_BK).masked_fill(places_K >= counts_B[:, None], 0.0)
    return surprisals_BK.sum(1) / counts_B.clamp(min=1)


def matching_odds(teacher: Outputs, partners_BK: Tensor, *, of_images: bool) -> Tensor:
    """(B, K) log-odds that each row's image (or caption) belongs to each of K captions (or images) of all ranks. The
    teacher reads one column of them at a time."""
    import torch

    from mmflow.learning.outputs import gather_encoded, select_rows

    assert teacher.text is not None, "missing() has seen that the teacher has a fusion"
    own, candidates = (teacher.image, teacher.text) if of_images else (teacher.text, teacher.image)
    columns = []
    with torch.no_grad():
        everywhere = gather_encoded(candidates, teacher.ranks.gather)
        for partners_B in partners_BK.T:
            others = select_rows(everywhere, partners_B)
            fused = teacher.model.fuse(*((own, others) if of_images else (others, own)))
            logits_B2 = teacher.model.matching_logits(fused).float()
            columns.append(logits_B2[:, 1] - logits_B2[:, 0])
    return torch.stack(columns, 1)
