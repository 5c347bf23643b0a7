"""The gradient of one step: of a whole batch at once, or of one that goes through the model in micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmflow.learning.learner import Parts
from mmflow.learning.micro_batches import MicroBatch
from mmflow.loading.batches import Batch
from mmflow.models.scale import Scale
from mmflow.training.guards import Buffers
from mmflow.training.random_state import random_state, set_random_state


def descend(engine: Any, batch: Batch, step: int) -> tuple[Tensor, Parts]:
    """Forward and backward of this rank's part of a batch; the loss, () without a graph, and its parts by name.

    What is left is `engine.step()`, once. Collective.
    """
    num_micro_batches = engine.gradient_accumulation_steps()
    if num_micro_batches == 1:
        loss, parts = engine(batch, step)
        engine.backward(loss)
        return loss.detach(), parts
    return _in_micro_batches(engine, batch, step, num_micro_batches)


def _in_micro_batches(engine: Any, batch: Batch, step: int, num_micro_batches: int) -> tuple[Tensor, Parts]:
    learner, size = engine.module.of(batch), engine.train_micro_batch_size_per_gpu()
    cuts = [slice(start, min(start + size, len(batch.real))) for start in range(0, len(batch.real), size)]
    rows = learner.rows(batch)
    places = learner.places(batch, step, rows, cuts)
    pieces = [
        (rows_of(batch, cut), MicroBatch(rows.micro_batch(cut, num_micro_batches), places, slopes={})) for cut in cuts
    ]
    loss, parts = torch.zeros((), device=batch.real.device), Parts()
    states: list[dict[str, Tensor]] = []
    if learner.compares:
        embedded = []
        buffers = Buffers(learner)
        with torch.no_grad():
            for piece, known in pieces:
                states.append(random_state(engine.device))
                embedded.append(engine(piece, step, replace(known, slopes=None))[1])
        buffers.bring_back()  # a batch counts once in running statistics
        loss, parts, slopes = learner.compare(batch, step, rows, _together(embedded))
        pieces = [
            (piece, replace(known, slopes=_slopes_of(slopes, cut, num_micro_batches)))
            for (piece, known), cut in zip(pieces, cuts, strict=True)
        ]
    for number, (piece, known) in enumerate(pieces):
        engine.set_gradient_accumulation_boundary(number == num_micro_batches - 1)
        if states:
            set_random_state(engine.device, states[number])  # what was dropped must be dropped again
        part_of_loss, more = engine(piece, step, known)
        engine.backward(part_of_loss)
        loss = loss + part_of_loss.detach() / num_micro_batches
        for name, value in more.items():
            parts[name] = parts.get(name, 0.0) + value.detach() / num_micro_batches
    return loss, parts


def rows_of(batch: Batch, cut: slice) -> Batch:
    """Some rows of a batch, as one of their own."""
    places = None if batch.places is None else batch.places[cut]
    return replace(batch.map_tensors(lambda each: each[cut]), keys=batch.keys[cut], places=places, skipped=())


def _together(embedded: Sequence[Parts]) -> Parts:
    """Of all micro-batches: their rows in order, and the scale, which is the same for each."""
    return {
        name: first if name in Scale._fields else torch.cat([each[name] for each in embedded])
        for name, first in embedded[0].items()
    }


def _slopes_of(slopes: Parts, cut: slice, num_micro_batches: int) -> Parts:
    """Those of a micro-batch. DeepSpeed divides the gradient of each by their number; the scale has a part in each."""
    return {name: slope if name in Scale._fields else slope[cut] * num_micro_batches for name, slope in slopes.items()}
