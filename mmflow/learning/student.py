"""The student while it learns: its model, its objectives and the distillation losses of its teachers, as one module.

Embeddings and layers of other widths than the teacher's are compared through projections. The package leaves them out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.learning.cached_embeddings import CachedTeacher
from mmflow.learning.distillation import (
    DistillationLossesConfig,
    InitialiseConfig,
    distillation_total,
    teachers_by_loss,
)
from mmflow.learning.distillation.loss import (
    SIDES,
    DistillationBatch,
    DistillationLoss,
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
        # For each teacher and side the pairs of layers to compare, (student's, teacher's).
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
        pairs = [(side, here) for teacher in self._layer_pairs for side in teacher for here, _ in teacher[side]]
        outputs = self._outputs(learner.model, learner.config, batch, step, rows, self._losses.values(), pairs)
        loss, parts = total(outputs, learner.tasks[batch.task], step)
        batches = {}
        for name, numbers in self._numbers.items():
            whole = sum(self._teachers[number].weight for number in numbers)
            shares = [replace(teachers[number], share=self._teachers[number].weight / whole) for number in numbers]
            batches[name] = DistillationBatch(outputs, shares)
        distillation, values = distillation_total(self._losses, batches, step)
        return loss + distillation, parts | values | scale_parts(outputs)

    def _teacher_outputs(self, number: int, batch: Batch, step: int, rows: GlobalRows) -> TeacherOutputs:
        teacher, device = self._teachers[number], batch.pixels.device
        cached = outputs = None
        if teacher.cached is not None:
            assert batch.places is not None, "a loader of stored augmentations gives the places of its rows"
            cached = Embeddings(*(tensor.to(device) for tensor in teacher.cached.read(batch.places)))
        if teacher.loaded is not None:
            if teacher.reading is not None:
                ids, mask = batch.readings[sum(before.reading is not None for before in self._teachers[:number])]
                batch = replace(batch, token_ids=ids, token_mask=mask)
            model = teacher.loaded.model.to(device)
            losses = [loss for name, loss in self._losses.items() if number in self._numbers[name]]
            pairs = [(side, there) for side, pairs in self._layer_pairs[number].items() for _, there in pairs]
            outputs = self._outputs(model, teacher.loaded.config, batch, step, rows, losses, pairs)
        projections = self.projections[number]
        assert isinstance(projections, nn.ModuleDict)
        return TeacherOutputs(outputs, cached, projections, self._layer_pairs[number])

    def _outputs(
        self,
        model: Model,
        config: ModelConfig,
        batch: Batch,
        step: int,
        rows: GlobalRows,
        losses: Collection[DistillationLoss],
        layers: Collection[tuple[Side, int]],
    ) -> Outputs:
        """What a model gives for a batch, with the attention maps that losses read and the outputs of some layers."""
        sides = frozenset(side for loss in losses for side in loss.attention_sides())
        outputs = self.learner.outputs(model, config, batch, step, rows, attention_sides=sides)
        with ExitStack() as stack:
            for side in dict.fromkeys(side for side, _ in layers):
                encoder = encoder_of(model, side)
                assert encoder is not None
                numbers = {number for of_side, number in layers if of_side == side}
                outputs.layers[side] = stack.enter_context(capture_layers(encoder.backbone, numbers))
            for name in outputs.layers:
                getattr(outputs, name)  # encodes now, while the layers are captured
        return outputs


# --- the weights that a student begins with ---------------------------------------------------------------------------


def initialise(key: str, student: Model, teacher: Model, config: InitialiseConfig) -> list[str]:
    """Copy weights of the teacher into the student (Weight Selection, arXiv 2311.18823); the names of the tensors that
    keep their random values.

    A tensor is copied if the teacher has one of its name, in the chosen layer, with the same or greater widths. Which
    units are taken follows from the two widths alone, so all modules that share a vector take the same units of it.
    `key` is the recipe's. Raises RecipeError if an encoder has nothing in common with the teacher's.
    """
    layers = _chosen_layers(student, teacher, config.layers)
    rows_first = {f"{name}.weight" for name, module in student.named_modules() if isinstance(module, nn.Embedding)}
    theirs, ours = teacher.state_dict(), student.state_dict()
    kept = []
    for name, tensor in ours.items():
        source = theirs.get(_teacher_name(name, layers))
        part = None if source is None else _fitting_part(tensor, source, config.width, name in rows_first)
        if part is None:
            kept.append(name)
        else:
            tensor.copy_(part)  # a state's tensors share the student's storage
    for side in SIDES:
        names = {name for name in ours if name.startswith(f"{side}.")}
        if names and names <= set(kept):
            raise RecipeError(
                f"{key}: no weight of the teacher's {side} encoder fits the student's; give both the same type, or "
                "leave initialise out"
            )
    return kept


def positions(num_student: int, num_teacher: int, which: Literal["first", "last", "even"]) -> list[int]:
    """The numbers of the teacher's layers or units that the student takes, which has no more of them."""
    if which == "first" or num_student == num_teacher:
        return list(range(num_student))
    if which == "last":
        return list(range(num_teacher - num_student, num_teacher))
    if num_student == 1:
        return [0]
    return [round(number * (num_teacher - 1) / (num_student - 1)) for number in range(num_student)]


def _chosen_layers(student: Model, teacher: Model, which: Literal["first", "last", "even"]) -> dict[str, list[int]]:
    """For each of the student's lists of layers, the numbers of the teacher's layers that it takes. Lists that are
    longer than the teacher's are left out, and their layers keep their own numbers."""
    modules = dict(teacher.named_modules())
    chosen: dict[str, list[int]] = {}
    for name, module in student.named_modules():  # an outer list before those within it
        theirs = modules.get(_teacher_name(name, chosen))
        if isinstance(module, nn.ModuleList) and isinstance(theirs, nn.ModuleList) and len(theirs) >= len(module):
            chosen[name] = positions(len(module), len(theirs), which)
    return chosen


def _teacher_name(name: str, layers: dict[str, list[int]]) -> str:
    """The teacher's name of a student's module or tensor."""
    parts = name.split(".")
    renamed = list(parts)
    for place, part in enumerate(parts):
        chosen = layers.get(".".join(parts[:place]))
        if chosen is not None and part.isdigit():
            renamed[place] = str(chosen[int(part)])
    return ".".join(renamed)


def _fitting_part(tensor: Tensor, source: Tensor, width: Literal["first", "even"], rows_first: bool) -> Tensor | None:
    """The part of the teacher's tensor with the shape of the student's; None if there is none.

    Widths may be smaller: both of a matrix or kernel, that of a vector, the last of learned tokens. The sides of a
    kernel and the numbers of tokens or positions must be equal, but an embedding may have fewer rows: the first.
    """
    if tensor.dim() != source.dim():
        return None
    shrinking = {0: (), 3: (2,)}.get(tensor.dim(), (0, 1))
    for dimension, (ours, theirs) in enumerate(zip(tensor.shape, source.shape, strict=True)):
        if ours == theirs:
            continue
        if ours > theirs or dimension not in shrinking:
            return None
        which = "first" if rows_first and dimension == 0 else width
        source = source.index_select(dimension, torch.tensor(positions(ours, theirs, which)))
    return source
