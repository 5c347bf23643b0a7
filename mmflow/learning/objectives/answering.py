"""Answering a question about an image: choose one of the known answers, or write it word by word.

    index    −log p(answer)
    scores   −Σ_a [ s_a log σ(l_a) + (1 − s_a) log(1 − σ(l_a)) ]   (arXiv 1708.02711, section 3.5)
    written  −mean over words of log p(w_t | question, image, w_0 … w_{t−1})   (BLIP, arXiv 2201.12086, section 5.3)

The first two are means over rows, the last over words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from mmflow.learning import Objective
from mmflow.learning.objectives.captioning import next_token_loss, predicted_tokens
from mmflow.learning.objectives.classification import CLASS_HEAD
from mmflow.loading.config import LoaderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import Outputs
    from mmflow.learning.rows import GlobalRows

# Shapes: B rows of this rank, C answers, A tokens of an answer, V vocabulary.


class Answering(Objective):
    """The answer to a question about the image."""

    by: Literal["classes", "generation"] = "classes"
    """Choose among the known answers, or write the answer word by word."""
    targets: Literal["index", "scores"] = "index"
    """For classes: the one right answer, or a score for each answer by how many annotators gave it."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all answers, or over the vocabulary. Not for scores, which are soft."""

    TRAINS: ClassVar = {"classes": {"by": "classes"}, "decoder": {"by": "generation"}}

    @model_validator(mode="after")
    def _check_targets(self) -> Answering:
        if self.targets == "scores" and (self.by == "generation" or self.label_smoothing):
            raise ValueError(
                "targets: scores needs by: classes and no label_smoothing; set targets to index, or leave those out"
            )
        return self

    def needs(self) -> dict[str, str]:
        fused = {"fused": "give the model a fusion"}
        if self.by == "classes":
            return fused | CLASS_HEAD
        return fused | {
            "decoded": "give the model a decoder",
            "decoded from the question": "set the model's decoder.memory to fused",
        }

    def missing_target(self, loader: LoaderConfig) -> str | None:
        return "text to questions" if loader.text != "questions" else None

    def places(self, outputs: Outputs) -> Tensor:
        """(B,) bool: the rows with a known answer, −1 is unknown; (B, A) bool: the words to write."""
        if self.by == "generation":
            return predicted_tokens(outputs.target("answer_mask"), outputs.rows.real_B)
        if self.targets == "scores":
            return outputs.rows.real_B
        return outputs.rows.real_B & (outputs.target("answer") >= 0)

    def loss(self, outputs: Outputs) -> Tensor:
        model, smoothing = outputs.model, self.label_smoothing
        if self.by == "generation":
            answer_ids_BA = outputs.target("answer_ids")
            logits_BAV = model.decode(model.memory(outputs.image, outputs.text), answer_ids_BA)
            gather = outputs.gather_places("answering")
            return next_token_loss(logits_BAV, answer_ids_BA, self.places(outputs), gather, smoothing)
        logits_BC = model.class_logits(outputs.fused)
        if self.targets == "scores":
            return answer_scores_loss(logits_BC, outputs.target("answer_scores"), outputs.rows)
        answer_B = outputs.target("answer")
        return outputs.mean_cross_entropy("answering", logits_BC, answer_B, self.places(outputs), smoothing)


def answer_scores_loss(logits_BC: Tensor, scores_BC: Tensor, rows: GlobalRows) -> Tensor:
    """This rank's part of the loss, (). `scores_BC` are in [0, 1]."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    losses_BC = binary_cross_entropy_with_logits(logits_BC.float(), scores_BC.float(), reduction="none")
    return rows.mean(losses_BC.sum(1))
