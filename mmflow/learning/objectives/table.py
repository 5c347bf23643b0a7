"""The objectives of a recipe: what each reads of the model, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.learning.config import AnsweringConfig, MatchingConfig, ObjectiveConfig, ObjectivesConfig
from mmflow.learning.objectives.answering import answering
from mmflow.learning.objectives.captioning import captioning
from mmflow.learning.objectives.classification import classification
from mmflow.learning.objectives.contrastive import contrastive
from mmflow.learning.objectives.masked_image import masked_image
from mmflow.learning.objectives.masked_language import masked_language
from mmflow.learning.objectives.matching import matching
from mmflow.learning.objectives.sigmoid import sigmoid
from mmflow.learning.outputs import MaskingTokens, Outputs

OBJECTIVES: dict[str, Callable[[Outputs, Any], Tensor]] = {
    "contrastive": contrastive,
    "sigmoid": sigmoid,
    "matching": matching,
    "masked_language": masked_language,
    "masked_image": masked_image,
    "captioning": captioning,
    "answering": answering,
    "classification": classification,
}
"""By name: a batch of this rank and the objective's section → the loss (), whose mean over ranks is that of the global
batch."""

_REMEDIES = {
    "similarities": "give the model a text encoder and an embedding_width",
    "embeddings": "give the model a text encoder and an embedding_width, and no video of kind tight",
    "bias": "give the model a bias (SigLIP's is -10)",
    "fused": "give the model a fusion",
    "decoded": "give the model a decoder",
    "decoded from the image": "set the model's decoder.memory to image",
    "decoded from the question": "set the model's decoder.memory to fused",
    "a token that hides a word": "take a tokenizer with [MASK] or <mask>",
    "matching_logits": "add matching to the model's heads",
    "masked_language_logits": "add masked_language to the model's heads",
    "masked_image_pixels": "add masked_image to the model's heads",
    "class_logits": "add classes to the model's heads",
}


def needs(name: str, section: ObjectiveConfig) -> tuple[str, ...]:
    """What an objective reads, the first thing to be named first."""
    if isinstance(section, MatchingConfig):
        return ("fused", "matching_logits", *(("embeddings",) if section.negatives == "hard" else ()))
    if isinstance(section, AnsweringConfig):
        return ("fused", *(("class_logits",) if section.by == "classes" else ("decoded", "decoded from the question")))
    return {
        "contrastive": ("similarities",),
        "sigmoid": ("embeddings", "bias"),
        "masked_language": ("masked_language_logits", "a token that hides a word"),
        "masked_image": ("masked_image_pixels",),
        "captioning": ("decoded", "decoded from the image"),
        "classification": ("class_logits",),
    }[name]


def check(key: str, objectives: ObjectivesConfig, gives: Set[str], special: MaskingTokens) -> None:
    """Raise RecipeError where an objective reads what the model, whose `gives` these are, or the tokenizer do not give.
    `key` is the recipe's, for the message."""
    given = set(gives)
    if given & {"embeddings", "pair_scores"}:
        given.add("similarities")
    if special.mask is not None:
        given.add("a token that hides a word")
    for name, section in objectives.named.items():
        for need in needs(name, section):
            if need not in given:
                raise RecipeError(f"{key}.{name}: it needs {need}; {_REMEDIES[need]}, or leave {name} out")


def total(outputs: Outputs, objectives: ObjectivesConfig, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to descend at a step, (), and each objective's own before its weight, by name.

    An objective of weight 0 is computed all the same: ZeRO-3 waits for ever for a module that some step leaves out.
    """
    parts = {name: OBJECTIVES[name](outputs, section) for name, section in objectives.named.items()}
    weights = [section.weight_at(step) for section in objectives.named.values()]
    loss = torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)]).sum()
    return loss, parts
