"""Rows that come in micro-batches, with the gradient of the whole batch (GradCache, arXiv 2101.06983, section 3).

Most objectives are means over places, rows or words or pixels: a micro-batch has its part of the mean as soon as it
knows how many places the whole batch has. Those that compare all rows read embeddings alone. So these are made first,
without a graph; the losses are taken of all of them; and when a micro-batch comes again, the slope of the losses pulls
at each of its embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmflow.learning.config import ObjectivesConfig
from mmflow.learning.objectives.answering import answering_places
from mmflow.learning.objectives.captioning import captioning_places
from mmflow.learning.objectives.classification import classification_places
from mmflow.learning.objectives.masked_image import masked_image_places
from mmflow.learning.objectives.masked_language import masked_language_places
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import GlobalRows

# Shapes: B rows of this rank, M micro-batches of a rank, P of all ranks, K objectives.

COMPARING = ("contrastive", "sigmoid")
"""The objectives that compare all rows of a batch by their embeddings."""

PLACES: dict[str, Callable[[Outputs, Any], Tensor]] = {
    "masked_language": masked_language_places,
    "masked_image": masked_image_places,
    "captioning": captioning_places,
    "answering": answering_places,
    "classification": classification_places,
}
"""The objectives that are means: (B, …) bool, the places that each row is learnt from."""


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch knows of the batch that it is a part of."""

    rows: GlobalRows
    places: Mapping[str, Tensor]  # by objective, how many each micro-batch of every rank has, (P,) int64
    slopes: Mapping[str, Tensor] | None = None  # of the losses that compare rows; None: first it is embedded


def comparing(objectives: ObjectivesConfig) -> ObjectivesConfig:
    """Those that compare rows."""
    return objectives.model_copy(update={name: None for name in objectives.named if name not in COMPARING})


def averaging(objectives: ObjectivesConfig) -> ObjectivesConfig:
    """Those that are means over places."""
    return objectives.model_copy(update={name: None for name in objectives.named if name in COMPARING})


def count_places(outputs: Outputs, objectives: ObjectivesConfig, cuts: Sequence[slice]) -> dict[str, Tensor]:
    """How many places each micro-batch of every rank has, by objective. `outputs` are of all of this rank's rows."""
    named = averaging(objectives).named
    if not named:
        return {}
    found_K = [PLACES[name](outputs, section) for name, section in named.items()]
    counts_MK = torch.stack([torch.stack([found[cut].sum() for found in found_K]) for cut in cuts])
    return dict(zip(named, outputs.gather(counts_MK).unbind(1), strict=True))


def pulled(embedded: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> Tensor:
    """A loss of value 0, (), whose gradient by each tensor is its slope."""
    terms = [((embedded[name] - embedded[name].detach()) * slope).sum() for name, slope in slopes.items()]
    return torch.stack(terms).sum() if terms else torch.zeros(())
