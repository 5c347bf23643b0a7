"""The order of hard negatives, from a teacher that reads picture and caption together to a student that compares
vectors (after CPRD, arXiv 2407.07479): how much likelier one wrong partner is than another means little across the two
kinds of model, which of them is likelier does.

    loss = −½ · mean_i [ mean_k log( exp z_ik / Σ_{l ≥ k} exp z_il ) of captions + the same of pictures ]

z_i1 … z_iK are the student's scaled cosines of row i with its K hardest wrong partners, in the teacher's order: the
negative log-likelihood of that order (ListMLE). The last of an order has nothing below it, and counts nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmflow.learning.chance import fingerprint
from mmflow.learning.distillation.config import RankingConfig
from mmflow.learning.distillation.given import Heard, scaled_products
from mmflow.learning.objectives.matching import chosen_rows, joined
from mmflow.learning.outputs import Outputs
from mmflow.models.encoders import Encoded

# Shapes: B rows of this rank, N rows of all ranks, K hard negatives of a row, E the width of the shared space.


def ranking(heard: Heard, config: RankingConfig) -> Tensor:
    """The loss of a batch, (). Rows of one caption or one key are never each other's wrong partners."""
    outputs, space = heard.student.live, heard.student.space
    identities_BI = torch.stack((fingerprint(outputs.token_ids, outputs.token_mask), outputs.key_hashes), 1)
    same_BN = (identities_BI[:, None] == heard.gather(identities_BI)).any(-1)
    may_BN = heard.rows.real_N & ~same_BN
    num_negatives = min(config.negatives, len(heard.rows.real_N))
    total_B = torch.zeros_like(heard.rows.real_B, dtype=torch.float32)
    directions = ((space.image_BE, space.text_BE), (space.text_BE, space.image_BE))
    for direction, (anchors_BE, candidates_BE) in enumerate(directions):
        logits_BN = scaled_products(anchors_BE, heard.gather(candidates_BE), space.logit_scale.float(), may_BN)
        hardest_BK = logits_BN.detach().topk(num_negatives, dim=1).indices
        student_BK, there_BK = logits_BN.gather(1, hardest_BK), may_BN.gather(1, hardest_BK)
        for teaching in heard.teachings:
            teacher_BK = _odds(teaching.given.live, hardest_BK, of_images=direction == 0)
            total_B = total_B + teaching.share * order_surprisal(student_BK, teacher_BK, there_BK)
    return heard.rows.mean(0.5 * total_B)


def order_surprisal(student_BK: Tensor, teacher_BK: Tensor, there_BK: Tensor) -> Tensor:
    """(B,) −log likelihood of the teacher's order under the student's scores, the mean over those that have another
    below them; 0 where fewer than two are `there` (bool)."""
    order_BK = teacher_BK.masked_fill(~there_BK, -torch.inf).argsort(dim=1, descending=True, stable=True)
    there_BK = there_BK.gather(1, order_BK)  # those that are not there come last
    scores_BK = student_BK.gather(1, order_BK).masked_fill(~there_BK, torch.finfo(student_BK.dtype).min)
    below_BK = scores_BK.flip(1).logcumsumexp(1).flip(1)
    counts_B = (there_BK.sum(1) - 1).clamp(min=0)
    places_K = torch.arange(there_BK.shape[1], device=there_BK.device)
    surprisals_BK = (below_BK - scores_BK).masked_fill(places_K >= counts_B[:, None], 0.0)
    return surprisals_BK.sum(1) / counts_B.clamp(min=1)


@torch.no_grad()
def _odds(teacher: Outputs, partners_BK: Tensor, *, of_images: bool) -> Tensor:
    """(B, K) log-odds that each row's picture (or caption) belongs to each of some captions (or pictures) of all ranks,
    a column of them at a time."""
    assert teacher.text is not None, "check() has seen that it fuses"
    here, there = (teacher.image, teacher.text) if of_images else (teacher.text, teacher.image)
    everywhere = joined(there, teacher.gather)
    columns = []
    for partners_B in partners_BK.T:
        others: Encoded = chosen_rows(everywhere, partners_B)
        fused = teacher.model.fuse(*((here, others) if of_images else (others, here)))
        logits_B2 = teacher.model.matching_logits(fused).float()
        columns.append(logits_B2[:, 1] - logits_B2[:, 0])
    return torch.stack(columns, 1)
