"""The student while it learns: its model, its objectives and the distillation losses of its teachers, as one module.

Embeddings and layers whose widths differ from the teacher's are compared through projections, which the package leaves
out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmflow.learning.cached import CachedTeacher
from mmflow.learning.distillation import DistillationLossesConfig, distillation_total, teachers_by_loss
from mmflow.learning.distillation.loss import (
    SIDES,
    DistillationBatch,
    ModelTraits,
    Side,
    TeacherOutputs,
    capture_layers,
    encoder_of,
)
from mmflow.learning.learner import Learner, Parts, scale_parts
from mmflow.learning.objectives import total
from mmflow.learning.outputs import Embeddings, Outputs
from mmflow.learning.rows import GlobalRows
from mmflow.loading.batches import Batch, Reading
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model
from mmflow.models.package import LoadedModel

# Shapes: B rows of this rank, T places of a sequence, W width of a layer.

Captured = Mapping[Side, Mapping[int, Tensor]]
"""By side and number the outputs of layers, (B, T, W)."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher, which does not learn: its model, its cached embeddings, which are read instead of the model's, or
    both."""

    weight: float = 1.0
    loaded: LoadedModel | None = None
    cached: CachedTeacher | None = None
    reading: Reading | None = None  # how it reads texts, if it has another tokenizer than the student

    @property
    def embedding_width(self) -> int | None:
        if self.cached is not None:
            return self.cached.width
        return None if self.loaded is None else self.loaded.config.embedding_width

    @property
    def traits(self) -> ModelTraits:
        own_tokens = self.reading is not None
        if self.loaded is None:
            return ModelTraits(frozenset({"embeddings"}), None, own_tokens=own_tokens)
        model = self.loaded.model
        return ModelTraits(model.gives, model, self.loaded.config.image_pixels, own_tokens)


class Student(nn.Module):
    """A learner with teachers. Its batches have `readings` and images of `image_pixels`."""

    def __init__(
        self, learner: Learner, teachers: Sequence[Teacher], losses: DistillationLossesConfig, *, key: str = "distill"
    ) -> None:
        """`key` is the recipe's, for errors. Raises RecipeError for a loss that the student cannot learn or no teacher
        can teach."""
        super().__init__()
        self.learner = learner
        self._losses = losses.named
        self._teachers = tuple(teachers)  # not modules, which would make their weights parameters of this one
        self.readings = tuple(teacher.reading for teacher in teachers if teacher.reading is not None)
        loaded = [teacher.loaded for teacher in teachers if teacher.loaded is not None]
        self.image_pixels = max(config.image_pixels for config in (learner.config, *(model.config for model in loaded)))
        for teacher in loaded:
            teacher.model.requires_grad_(False)
        student = ModelTraits(learner.model.gives, learner.model, learner.config.image_pixels)
        traits = [teacher.traits for teacher in teachers]
        self._numbers = teachers_by_loss(key, losses, student, traits)
        # For each teacher and side the layers whose outputs are compared, (student's, teacher's).
        self._layer_pairs: list[dict[Side, list[tuple[int, int]]]] = [{} for _ in teachers]
        for name, loss in self._losses.items():
            for number in self._numbers[name]:
                self._layer_pairs[number] |= loss.layer_pairs(student, traits[number])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(learner.seed)  # a restart from the first step must draw the same
            self.projections = nn.ModuleList(
                nn.ModuleDict(
                    {name: nn.Linear(*widths, bias=False) for name, widths in self._widths(number, student, teacher)}
                )
                for number, teacher in enumerate(traits)
            )

    def _widths(self, number: int, student: ModelTraits, teacher: ModelTraits) -> list[tuple[str, tuple[int, int]]]:
        """The names of a teacher's projections, and the widths (student's, teacher's) of each."""
        widths: list[tuple[str, tuple[int | None, int | None]]] = []
        if any(number in self._numbers[name] for name, loss in self._losses.items() if loss.PROJECTS_EMBEDDINGS):
            both = self.learner.config.embedding_width, self._teachers[number].embedding_width
            widths += [(side, both) for side in SIDES]
        for side, pairs in self._layer_pairs[number].items():
            ours, theirs = student.layers[side], teacher.layers[side]
            assert ours is not None
            assert theirs is not None
            for pair, (here, there) in enumerate(pairs):
                widths.append((f"{side}_{pair}", (ours.widths[here], theirs.widths[there])))
        return [(name, (ours, theirs)) for name, (ours, theirs) in widths if ours and theirs and ours != theirs]

    def forward(self, batch: Batch, step: int, *, examined: bool = False) -> tuple[Tensor, Parts]:
        """The loss to descend at a step, (), and by name each objective's loss, each distillation loss, and the logit
        scale. A batch that is `examined` is shown to the learner alone."""
        if examined:
            examination: tuple[Tensor, Parts] = self.learner(batch, step, examined=True)
            return examination
        learner, rows = self.learner, self.learner.rows(batch)
        with torch.no_grad():
            teachers = [self._teacher_outputs(number, batch, step, rows) for number in range(len(self._teachers))]
        layers: dict[Side, set[int]] = {}
        for pairs_by_side in self._layer_pairs:
            for side, pairs in pairs_by_side.items():
                layers.setdefault(side, set()).update(here for here, _ in pairs)
        sides = {side for loss in self._losses.values() for side in loss.attention_sides()}
        outputs, captured = self._outputs(learner.model, learner.config, batch, step, rows, sides, layers)
        loss, parts = total(outputs, learner.tasks[batch.task], step)
        batches = {
            name: DistillationBatch(outputs, self._shares(numbers, teachers, captured))
            for name, numbers in self._numbers.items()
        }
        distillation, values = distillation_total(self._losses, batches, step)
        return loss + distillation, parts | values | scale_parts(outputs)

    def _teacher_outputs(
        self, number: int, batch: Batch, step: int, rows: GlobalRows
    ) -> tuple[Outputs | None, Embeddings | None, Captured]:
        """A teacher's outputs for a batch, its cached embeddings, and the outputs of its layers."""
        teacher, device = self._teachers[number], batch.pixels.device
        cached = None
        if teacher.cached is not None:
            assert batch.places is not None, "a loader of stored augmentations gives the places of its rows"
            cached = Embeddings(*(tensor.to(device) for tensor in teacher.cached.read(batch.places)))
        if teacher.loaded is None:
            return None, cached, {}
        if teacher.reading is not None:
            ids, mask = batch.readings[sum(before.reading is not None for before in self._teachers[:number])]
            batch = replace(batch, token_ids=ids, token_mask=mask)
        model, config = teacher.loaded.model, teacher.loaded.config
        model.to(device)
        losses = [loss for name, loss in self._losses.items() if number in self._numbers[name]]
        sides = {side for loss in losses for side in loss.attention_sides()}
        layers = {side: {there for _, there in pairs} for side, pairs in self._layer_pairs[number].items()}
        outputs, captured = self._outputs(model, config, batch, step, rows, sides, layers)
        return outputs, cached, captured

    def _outputs(
        self,
        model: Model,
        config: ModelConfig,
        batch: Batch,
        step: int,
        rows: GlobalRows,
        attention_sides: Collection[str],
        layers: Mapping[Side, Collection[int]],
    ) -> tuple[Outputs, Captured]:
        """What a model gives for a batch, and the outputs of some of its layers."""
        outputs = self.learner.outputs(model, config, batch, step, rows, attention_sides=frozenset(attention_sides))
        captured: dict[Side, Mapping[int, Tensor]] = {}
        with ExitStack() as stack:
            for side, numbers in layers.items():
                encoder = encoder_of(model, side)
                assert encoder is not None
                captured[side] = stack.enter_context(capture_layers(encoder.backbone, numbers))
            for side in layers:
                getattr(outputs, side)  # encodes now, while the layers are captured
        return outputs, captured

    def _shares(
        self,
        numbers: Sequence[int],
        teachers: Sequence[tuple[Outputs | None, Embeddings | None, Captured]],
        captured: Captured,
    ) -> list[TeacherOutputs]:
        """The outputs of the teachers that a loss uses, with their shares of it."""
        whole = sum(self._teachers[number].weight for number in numbers)
        shares = []
        for number in numbers:
            outputs, cached, theirs = teachers[number]
            layers = {
                side: [(captured[side][here], theirs[side][there]) for here, there in pairs]
                for side, pairs in self._layer_pairs[number].items()
            }
            projections = self.projections[number]
            assert isinstance(projections, nn.ModuleDict)
            shares.append(TeacherOutputs(outputs, cached, projections, layers, self._teachers[number].weight / whole))
        return shares
