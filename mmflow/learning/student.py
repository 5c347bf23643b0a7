"""The student while it learns: its model, its objectives and the losses of its teachers, as one module.

Where what is compared is narrower or wider than the teacher's, it is compared through a projection, which is left out
of the package.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmflow.learning.cached import CachedTeacher
from mmflow.learning.distillation.config import DistillationLossesConfig
from mmflow.learning.distillation.given import SIDES, Given, Heard, Space, Teaching
from mmflow.learning.distillation.layers import captured, encoder_of, layer_pairs
from mmflow.learning.distillation.table import PROJECTED, Party, hearers, total_of_losses
from mmflow.learning.learner import Learner, Parts, scales
from mmflow.learning.objectives.table import total
from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import GlobalRows
from mmflow.loading.batches import Batch, Reading
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model
from mmflow.models.package import LoadedModel

# Shapes: B rows of this rank, T places of a sequence, W width of a layer.

Captured = Mapping[str, Mapping[int, Tensor]]
"""By side and number of the layer what it gives, (B, T, W)."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One that teaches and does not learn: by its model, by cached embeddings in place of the model's, or by those
    alone."""

    weight: float = 1.0
    loaded: LoadedModel | None = None
    cached: CachedTeacher | None = None
    reading: Reading | None = None  # of texts by tokens of its own; None: it reads the student's

    @property
    def width(self) -> int | None:
        """Of its shared space."""
        if self.cached is not None:
            return self.cached.width
        return None if self.loaded is None else self.loaded.config.embedding_width

    @property
    def party(self) -> Party:
        """What losses must know of it."""
        if self.loaded is None:
            return Party(frozenset({"embeddings"}), None, own_text=self.reading is not None)
        model = self.loaded.model
        return Party(model.gives, model, self.loaded.config.image_pixels, self.reading is not None)


class Student(nn.Module):
    """A learner that also hears its teachers. Its batches carry `readings`, and pictures of `image_pixels`."""

    def __init__(
        self, learner: Learner, teachers: Sequence[Teacher], losses: DistillationLossesConfig, *, key: str = "distill"
    ) -> None:
        """`key` is the recipe's, for errors. Raises RecipeError for a loss that the student cannot learn or nobody
        teach."""
        super().__init__()
        self.learner = learner
        self.losses = losses
        self._teachers = tuple(teachers)  # no modules: their weights would be parameters of this one
        self.readings = tuple(each.reading for each in teachers if each.reading is not None)
        sides = [each.loaded.config.image_pixels for each in teachers if each.loaded is not None]
        self.image_pixels = max([learner.config.image_pixels, *sides])
        for teacher in teachers:
            if teacher.loaded is not None:
                teacher.loaded.model.requires_grad_(False)
        student = Party(learner.model.gives, learner.model, learner.config.image_pixels)
        parties = [teacher.party for teacher in teachers]
        self._hearers = hearers(key, losses, student, parties)
        # Of each teacher, by side: the layers that are compared, (student's, teacher's).
        self._pairs: list[dict[str, list[tuple[int, int]]]] = [
            {
                side: layer_pairs(losses.hidden.layers, _count(student, side), _count(party, side))
                for side in (losses.hidden.sides if number in self._hearers["hidden"] else ())
            }
            if losses.hidden is not None
            else {}
            for number, party in enumerate(parties)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(learner.seed)  # a restart from the first step must draw the same
            self.projections = nn.ModuleList(
                nn.ModuleDict(
                    {name: nn.Linear(*widths, bias=False) for name, widths in self._widths(number, student, party)}
                )
                for number, party in enumerate(parties)
            )

    def _widths(self, number: int, student: Party, party: Party) -> list[tuple[str, tuple[int, int]]]:
        """By the names of projections the widths, (student's, teacher's), that differ."""
        widths: list[tuple[str, tuple[int | None, int | None]]] = []
        if any(number in self._hearers.get(name, ()) for name in PROJECTED):
            widths += [(side, (self.learner.config.embedding_width, self._teachers[number].width)) for side in SIDES]
        for side, pairs in self._pairs[number].items():
            ours, theirs = student.layers[side], party.layers[side]
            assert ours is not None
            assert theirs is not None
            for place, (here, there) in enumerate(pairs):
                widths.append((f"{side}_{place}", (ours.widths[here], theirs.widths[there])))
        return [(name, (ours, theirs)) for name, (ours, theirs) in widths if ours and theirs and ours != theirs]

    def forward(self, batch: Batch, step: int, *, examined: bool = False) -> tuple[Tensor, Parts]:
        """The loss to descend at a step, (), and by name each objective's part, each loss's, and the logit scale. A
        batch that is `examined` is shown to the learner alone: teachers are not asked."""
        if examined:
            found: tuple[Tensor, Parts] = self.learner(batch, step, examined=True)
            return found
        rows = self.learner.rows(batch)
        with torch.no_grad():
            taught = [self._taught(number, batch, step, rows) for number in range(len(self._teachers))]
        layers: dict[str, set[int]] = {}
        for pairs_of_side in self._pairs:
            for side, pairs in pairs_of_side.items():
                layers.setdefault(side, set()).update(here for here, _ in pairs)
        sides = self.losses.attention.sides if self.losses.attention else ()
        outputs, captures = self._outputs(self.learner.model, self.learner.config, batch, step, rows, sides, layers)
        loss, parts = total(outputs, self.learner.objectives, step)
        student = Given(outputs)
        heard = {
            name: Heard(student, self._teachings(numbers, taught, captures), rows, outputs.gather)
            for name, numbers in self._hearers.items()
        }
        of_distillation, losses = total_of_losses(self.losses, heard, step)
        return loss + of_distillation, parts | losses | scales(outputs)

    def _taught(self, number: int, batch: Batch, step: int, rows: GlobalRows) -> tuple[Given, Captured]:
        """What a teacher makes of a batch."""
        teacher, device = self._teachers[number], batch.pixels.device
        space = None
        if teacher.cached is not None:
            assert batch.places is not None, "a loader of stored augmentations says where its rows lie"
            space = Space(*(each.to(device) for each in teacher.cached.read(batch.places)))
        if teacher.loaded is None:
            return Given(None, space), {}
        if teacher.reading is not None:
            before = sum(each.reading is not None for each in self._teachers[:number])
            ids, mask = batch.readings[before]
            batch = replace(batch, token_ids=ids, token_mask=mask)
        teacher.loaded.model.to(device)
        looks = self.losses.attention is not None and number in self._hearers["attention"]
        sides = self.losses.attention.sides if self.losses.attention and looks else ()
        layers = {side: {there for _, there in pairs} for side, pairs in self._pairs[number].items()}
        outputs, captures = self._outputs(teacher.loaded.model, teacher.loaded.config, batch, step, rows, sides, layers)
        return Given(outputs, space), captures

    def _outputs(
        self,
        model: Model,
        config: ModelConfig,
        batch: Batch,
        step: int,
        rows: GlobalRows,
        sides: Collection[str],
        layers: Mapping[str, Collection[int]],
    ) -> tuple[Outputs, Captured]:
        """What a model gives for a batch, with attention maps of some sides and what some layers give."""
        outputs = self.learner.outputs(model, config, batch, step, rows, attentions=frozenset(sides))
        captures = {}
        with ExitStack() as stack:
            for side, numbers in layers.items():
                encoder = encoder_of(model, side)
                assert encoder is not None
                captures[side] = stack.enter_context(captured(encoder.backbone, numbers))
            for side in layers:
                getattr(outputs, side)  # encoded now, while the layers are listened to
        return outputs, captures

    def _teachings(
        self, numbers: Sequence[int], taught: Sequence[tuple[Given, Captured]], captures: Captured
    ) -> list[Teaching]:
        """Of the teachers that are heard in a loss, with their shares of it."""
        whole = sum(self._teachers[number].weight for number in numbers)
        teachings = []
        for number in numbers:
            given, theirs = taught[number]
            hidden = {
                side: [(captures[side][here], theirs[side][there]) for here, there in pairs]
                for side, pairs in self._pairs[number].items()
            }
            share = self._teachers[number].weight / whole
            projections = self.projections[number]
            assert isinstance(projections, nn.ModuleDict)
            teachings.append(Teaching(share, given, projections, hidden))
        return teachings


def _count(party: Party, side: str) -> int:
    layers = party.layers[side]
    assert layers is not None, "hearers() has seen that it has layers"
    return len(layers)
