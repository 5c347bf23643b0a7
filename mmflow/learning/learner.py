"""What an optimizer trains: a model and its objectives as one module. Its forward pass is a step's loss.

One forward pass a step, because ZeRO-3 gathers parameters in the order of its calls, and autocast covers all of it.

A batch can come in micro-batches with the gradient of the whole (GradCache, arXiv 2101.06983, section 3). Most
objectives are means over places (rows, words or pixels): a micro-batch can compute its part of the mean if it knows how
many places the whole batch has. Objectives that compare all rows only read embeddings. So all embeddings are computed
first, without a graph; then the losses over all of them, with a gradient for each embedding; and when a micro-batch is
computed again, its loss has that gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmflow.learning import Objective
from mmflow.learning.objectives import ObjectivesConfig, total
from mmflow.learning.outputs import MaskingTokens, Outputs
from mmflow.learning.rows import ALONE, GlobalRows, Ranks, global_rows
from mmflow.loading.batches import Batch, normalise
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model, Scale

# Shapes: B rows of this rank, M micro-batches of a rank, P of all ranks, K objectives.

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch knows of its batch."""

    rows: GlobalRows
    places: Mapping[str, Tensor]  # by objective, how many places each micro-batch of every rank has, (P,) int64
    gradients: Mapping[str, Tensor] | None = None  # of what `Learner.compare` took; None in the pass that embeds


class Learner(nn.Module):
    """A model that is being trained, with the objectives of each of its tasks. Only the model ends up in its package.

    At every step all ranks have a batch of the same task: ZeRO-3 would wait forever for modules that only some ranks
    run.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        tasks: Sequence[ObjectivesConfig],
        special: MaskingTokens,
        *,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.tasks = tuple(objectives.named for objectives in tasks)
        self.special = special
        self.seed = seed
        self.ranks = ranks

    def forward(
        self, batch: Batch, step: int, micro_batch: MicroBatch | None = None, *, examined: bool = False
    ) -> tuple[Tensor, Parts]:
        """The loss to descend at a step, (), and by name what to report: each objective's loss, and the logit scale; of
        a batch that is `examined` the embeddings, if the model gives them, instead of the scale.

        The loss of a micro-batch is the objectives that are means over places, plus the gradients of those that compare
        rows. Without those gradients it only gives its embeddings.
        """
        if micro_batch is None:
            outputs = self.outputs(self.model, self.config, batch, step, self.rows(batch))
            loss, parts = total(outputs, self.tasks[batch.task], step)
            if not examined:
                return loss, parts | scale_parts(outputs)
            return loss, parts | (_embeddings(outputs) if "embeddings" in self.model.gives else {})
        outputs = self.outputs(self.model, self.config, batch, step, micro_batch.rows, places=micro_batch.places)
        # First in both passes, so that dropout draws the same numbers.
        embedded = _embeddings(outputs) | scale_parts(outputs) if self.compares_rows(batch) else {}
        if micro_batch.gradients is None:
            return torch.zeros(()), embedded
        loss, parts = _with_gradients(embedded, micro_batch.gradients), Parts()
        if means := self._objectives(batch, compare_rows=False):
            mean, parts = total(outputs, means, step)
            loss = loss + mean
        return loss, parts

    def _objectives(self, batch: Batch, *, compare_rows: bool) -> dict[str, Objective]:
        objectives = self.tasks[batch.task].items()
        return {name: objective for name, objective in objectives if compare_rows == objective.COMPARES_ROWS}

    def compares_rows(self, batch: Batch) -> bool:
        """Whether an objective of the batch's task compares all its rows."""
        return bool(self._objectives(batch, compare_rows=True))

    def count_places(self, batch: Batch, step: int, rows: GlobalRows, cuts: Sequence[slice]) -> dict[str, Tensor]:
        """How many places each micro-batch of every rank has, by objective. Collective, once a batch."""
        objectives = self._objectives(batch, compare_rows=False)
        if not objectives:
            return {}
        outputs = self.outputs(self.model, self.config, batch, step, rows, shapes_only=True)
        places_K = [objective.places(outputs) for objective in objectives.values()]
        counts_MK = torch.stack([torch.stack([places[cut].sum() for places in places_K]) for cut in cuts])
        return dict(zip(objectives, self.ranks.gather(counts_MK).unbind(1), strict=True))

    def compare(
        self, batch: Batch, step: int, rows: GlobalRows, embedded: Mapping[str, Tensor]
    ) -> tuple[Tensor, Parts, Parts]:
        """The loss of the objectives that compare rows, from the embeddings of all of them; what to report; and the
        gradient of each tensor in `embedded`. Reads no weight of the model. Collective."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in embedded.items()}
        outputs = self.outputs(self.model, self.config, batch, step, rows, shapes_only=True)
        outputs.image_embedding, outputs.text_embedding = leaves["image_embedding"], leaves["text_embedding"]
        outputs.scale = Scale(leaves["logit_scale"], leaves.get("logit_bias"))
        loss, parts = total(outputs, self._objectives(batch, compare_rows=True), step)
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return loss.detach(), parts | scale_parts(outputs), dict(zip(leaves, gradients, strict=True))

    def rows(self, batch: Batch) -> GlobalRows:
        """Which rows of all ranks are real. Collective, once a batch, however many models see it."""
        return global_rows(batch.real, self.ranks)

    def outputs(
        self,
        model: Model,
        config: ModelConfig,
        batch: Batch,
        step: int,
        rows: GlobalRows,
        *,
        attention_sides: frozenset[str] = frozenset(),
        places: Mapping[str, Tensor] | None = None,
        shapes_only: bool = False,
    ) -> Outputs:
        """What a model gives for a batch. Each step draws other masks and negatives, a resumed step the same. With
        `shapes_only` the pixels have a shape and no values."""
        device = batch.pixels.device
        if shapes_only:
            side = config.image_pixels
            pixels = torch.empty((*batch.pixels.shape[:-2], side, side), device="meta")
        else:
            pixels = _resized(normalise(batch.pixels, config.pixel_mean, config.pixel_std), config.image_pixels)
        return Outputs(
            model=model,
            pixels=pixels,
            token_ids=batch.token_ids,
            token_mask=batch.token_mask,
            frame_mask=batch.frame_mask,
            keys=batch.keys,
            targets=batch.targets,
            rows=rows,
            ranks=self.ranks,
            special=self.special,
            generator=torch.Generator(device).manual_seed(self.seed * 1_000_003 + step),
            attention_sides=attention_sides,
            places=places,
        )


def scale_parts(outputs: Outputs) -> Parts:
    """The logit scale and bias, as far as the model has them."""
    if outputs.model.scale is None:
        return {}
    return {name: value for name, value in outputs.scale._asdict().items() if value is not None}


def _embeddings(outputs: Outputs) -> Parts:
    return {"image_embedding": outputs.image_embedding, "text_embedding": outputs.text_embedding}


def _with_gradients(tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """A loss of value 0, (), that has the given gradients."""
    terms = [((tensors[name] - tensors[name].detach()) * gradient).sum() for name, gradient in gradients.items()]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _resized(pixels: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) or clips (B, F, 3, S, S) at a model's size, if another model of the batch has larger ones."""
    if pixels.shape[-1] == side:
        return pixels
    frames = pixels.flatten(0, -4)  # images stay as they are
    resized = nn.functional.interpolate(frames, (side, side), mode="bilinear", antialias=True)
    return resized.reshape(*pixels.shape[:-2], side, side)
