"""What an optimizer trains: a model and its objectives as one module, whose forward is a step's loss.

One forward a step, because ZeRO-3 gathers parameters by the order of a forward's calls, and autocast covers all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmflow.learning.config import ObjectivesConfig
from mmflow.learning.micro_batches import MicroBatch, averaging, comparing, count_places, pulled
from mmflow.learning.objectives.table import total
from mmflow.learning.outputs import MaskingTokens, Outputs
from mmflow.learning.rows import Gather, GlobalRows, PassOn, global_rows
from mmflow.loading.batches import Batch, normalise
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model, Scale

Parts = dict[str, Tensor]


def _alone(rows: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class Ranks:
    """How this rank exchanges tensors with the others; by default there are none."""

    rank: int = 0
    gather: Gather = _alone
    pass_on: PassOn = _alone


ALONE = Ranks()


class Learner(nn.Module):
    """A model that is being trained. Nothing but the model ends in its package."""

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        objectives: ObjectivesConfig,
        special: MaskingTokens,
        *,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.objectives = objectives
        self.special = special
        self.seed = seed
        self.ranks = ranks

    def forward(
        self, batch: Batch, step: int, micro_batch: MicroBatch | None = None, *, examined: bool = False
    ) -> tuple[Tensor, Parts]:
        """The loss to descend at a step, (), and what to report by name: each objective's own, and the logit scale; of
        a batch that is `examined` in place of the scale the embeddings, where the model gives them.

        Of a micro-batch the losses that are means over places, and the pull of those that compare rows; before their
        slopes are known, nothing but its embeddings.
        """
        if micro_batch is None:
            outputs = self.outputs(self.model, self.config, batch, step, self.rows(batch))
            loss, parts = total(outputs, self.objectives, step)
            if not examined:
                return loss, parts | scales(outputs)
            return loss, parts | (_embeddings(outputs) if "embeddings" in self.model.gives else {})
        outputs = self.outputs(self.model, self.config, batch, step, micro_batch.rows, places=micro_batch.places)
        embedded = _embedded(outputs) if self.compares else {}  # first in each pass, or dropout would not be the same
        if micro_batch.slopes is None:
            return torch.zeros(()), embedded
        loss, parts = pulled(embedded, micro_batch.slopes), Parts()
        means = averaging(self.objectives)
        if means.named:
            mean, parts = total(outputs, means, step)
            loss = loss + mean
        return loss, parts

    def of(self, batch: Batch) -> Learner:
        """The learner of a batch's task: itself, for it has one."""
        return self

    @property
    def compares(self) -> bool:
        """Whether an objective compares all rows of a batch."""
        return bool(comparing(self.objectives).named)

    def places(self, batch: Batch, step: int, rows: GlobalRows, cuts: Sequence[slice]) -> dict[str, Tensor]:
        """How many places each micro-batch of every rank has, by objective: an exchange, once a batch."""
        outputs = self.outputs(self.model, self.config, batch, step, rows, unseen=True)
        return count_places(outputs, self.objectives, cuts)

    def compare(
        self, batch: Batch, step: int, rows: GlobalRows, embedded: Mapping[str, Tensor]
    ) -> tuple[Tensor, Parts, Parts]:
        """The loss of the objectives that compare rows, from the embeddings of all of them; what to report; and the
        slopes by each tensor in `embedded`. No weight is read. Collective."""
        leaves = {name: each.detach().requires_grad_() for name, each in embedded.items()}
        outputs = self.outputs(self.model, self.config, batch, step, rows, unseen=True)
        outputs.image_embedding, outputs.text_embedding = leaves["image_embedding"], leaves["text_embedding"]
        outputs.scale = Scale(leaves["logit_scale"], leaves.get("logit_bias"))
        loss, parts = total(outputs, comparing(self.objectives), step)
        slopes = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return loss.detach(), parts | scales(outputs), dict(zip(leaves, slopes, strict=True))

    def rows(self, batch: Batch) -> GlobalRows:
        """Which rows of all ranks are real: an exchange, so once a batch, however many models are shown it."""
        return global_rows(batch.real, self.ranks.gather, self.ranks.rank)

    def outputs(
        self,
        model: Model,
        config: ModelConfig,
        batch: Batch,
        step: int,
        rows: GlobalRows,
        attentions: frozenset[str] = frozenset(),
        places: Mapping[str, Tensor] | None = None,
        *,
        unseen: bool = False,
    ) -> Outputs:
        """What a model gives for a batch, with the attention maps of the sides asked for. Another step draws other
        masks and negatives, a resumed one the same. Of pictures that stay `unseen` there is the shape alone."""
        device = batch.pixels.device
        if unseen:
            side = config.image_pixels
            pixels = torch.empty((*batch.pixels.shape[:-2], side, side), device="meta")
        else:
            pixels = _resized(normalise(batch.pixels, config.pixel_mean, config.pixel_std), config.image_pixels)
        return Outputs(
            model,
            pixels=pixels,
            token_ids=batch.token_ids,
            token_mask=batch.token_mask,
            frame_mask=batch.frame_mask,
            keys=batch.keys,
            targets=batch.targets,
            rows=rows,
            gather=self.ranks.gather,
            pass_on=self.ranks.pass_on,
            special=self.special,
            generator=torch.Generator(device).manual_seed(self.seed * 1_000_003 + step),
            attentions=attentions,
            places=places,
        )


def _embedded(outputs: Outputs) -> Parts:
    """All that the objectives that compare rows read."""
    return _embeddings(outputs) | scales(outputs)


def _embeddings(outputs: Outputs) -> Parts:
    return {"image_embedding": outputs.image_embedding, "text_embedding": outputs.text_embedding}


def scales(outputs: Outputs) -> Parts:
    """What the similarities of a model with a shared space are multiplied by and shifted by."""
    if outputs.model.scale is None:
        return {}
    return {name: value for name, value in outputs.scale._asdict().items() if value is not None}


def _resized(pixels: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, S, S) or clips (B, F, 3, S, S) at a model's side, where another model wants them larger."""
    if pixels.shape[-1] == side:
        return pixels
    frames = pixels.flatten(0, -4)  # of all clips in a row; pictures stay as they are
    resized = nn.functional.interpolate(frames, (side, side), mode="bilinear", antialias=True)
    return resized.reshape(*pixels.shape[:-2], side, side)
