"""Answering a question about a picture: among the known answers, or word by word.

    index    −log p(answer)
    scores   −Σ_a [ s_a log σ(l_a) + (1 − s_a) log(1 − σ(l_a)) ]   (arXiv 1708.02711, section 3.5)
    written  −mean over words of log p(w_t | question, image, w_0 … w_{t−1})   (BLIP, arXiv 2201.12086, section 5.3)

The first two are means over rows, the last over words.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mmflow.learning.config import AnsweringConfig
from mmflow.learning.objectives.captioning import next_token_loss, next_tokens
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import GlobalRows, mean_cross_entropy

# Shapes: B rows of this rank, C answers, A tokens of an answer, V vocabulary.


def answering(outputs: Outputs, config: AnsweringConfig) -> Tensor:
    """The objective of a batch, (). A row whose answer is −1, unknown, counts nowhere."""
    if config.by == "generation":
        return _written(outputs, config)
    logits_BC = outputs.model.class_logits(outputs.fused)
    if config.targets == "scores":
        return answer_scores_loss(logits_BC, outputs.target("answer_scores"), outputs.rows)
    known_B, gather = answering_places(outputs, config), outputs.gather_places("answering")
    return mean_cross_entropy(logits_BC, outputs.target("answer"), known_B, gather, config.label_smoothing)


def answering_places(outputs: Outputs, config: AnsweringConfig) -> Tensor:
    """(B,) bool the answers that are known, (B, A) the words to be written; scores are there for every real row."""
    if config.by == "generation":
        return next_tokens(outputs.target("answer_mask"), outputs.rows.real_B)
    if config.targets == "scores":
        return outputs.rows.real_B
    return outputs.rows.real_B & (outputs.target("answer") >= 0)


def answer_scores_loss(logits_BC: Tensor, scores_BC: Tensor, rows: GlobalRows) -> Tensor:
    """This rank's part of the loss, (). `scores_BC` are in [0, 1]: what each answer would earn."""
    losses_BC = binary_cross_entropy_with_logits(logits_BC.float(), scores_BC.float(), reduction="none")
    return rows.mean(losses_BC.sum(1))


def _written(outputs: Outputs, config: AnsweringConfig) -> Tensor:
    answer_ids_BA = outputs.target("answer_ids")
    logits_BAV = outputs.model.decode(outputs.model.memory(outputs.image, outputs.text), answer_ids_BA)
    places_BA, gather = answering_places(outputs, config), outputs.gather_places("answering")
    return next_token_loss(logits_BAV, answer_ids_BA, places_BA, gather, config.label_smoothing)
