"""A training as plain data, which travels to other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmflow.dataset.opened import open_dataset
from mmflow.learning.config import ObjectivesConfig
from mmflow.learning.distillation.config import InitialiseConfig, LessonsConfig
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import steps_per_epoch
from mmflow.models.config import LoraConfig, ModelConfig
from mmflow.training.config import TrainingConfig
from mmflow.training.tasks import Task
from mmflow.training.teachers import TeacherPackage


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """All that a rank needs to know."""

    stage: str  # the recipe's section, for errors
    dataset: str  # URI
    tokenizer_json: str
    model: ModelConfig
    loader: LoaderConfig
    objectives: ObjectivesConfig
    training: TrainingConfig
    seed: int
    package: str  # URI, where rank 0 writes the trained model
    journal: str  # URI, where rank 0 writes its telemetry
    checkpoints: str  # URI
    classes: tuple[str, ...] = ()  # labels or answers that targets are numbered by
    lineage: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None  # URI of the package that the model begins with
    lora: LoraConfig | None = None
    several: tuple[Task, ...] = ()  # in place of `loader` and `objectives`
    teachers: tuple[TeacherPackage, ...] = ()
    lessons: LessonsConfig | None = None
    initialise: InitialiseConfig | None = None  # by the first teacher
    stored_views: int = 0  # that the teachers' caches know; 0: they have none

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What is learnt: the stage itself is one task unless it has several."""
        return self.several or (Task(key=self.stage, loader=self.loader, objectives=self.objectives),)


def total_steps(tasks: Sequence[Task], dataset: str, training: TrainingConfig) -> int:
    """Steps of the whole training of a stage whose own dataset lies at a URI. An epoch has as many as an epoch of each
    task's data."""
    size = training.global_batch_size
    epoch = sum(steps_per_epoch(each.loader, open_dataset(each.dataset or dataset), size) for each in tasks)
    return training.epochs * epoch
