"""What a training learns, task by task: of several that the recipe names, or the one that the stage itself is."""

from __future__ import annotations

from dataclasses import dataclass

from mmflow.learning.config import ObjectivesConfig
from mmflow.loading.config import LoaderConfig
from mmflow.training.config import DistillConfig, PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """What batches are made of and what is learnt of them; plain data, so that it travels to other machines."""

    key: str  # of the recipe's section, for errors
    name: str = ""  # before its metrics; none where it is the only one
    weight: float = 1.0  # its share of the steps, beside the others'
    dataset: str | None = None  # URI; None: the stage's own
    loader: LoaderConfig
    objectives: ObjectivesConfig


def tasks_of(key: str, section: PretrainConfig | DistillConfig) -> tuple[Task, ...]:
    """The tasks of a section, whose key is the recipe's."""
    if isinstance(section, DistillConfig) or not section.tasks:
        return (Task(key=key, loader=section.loader, objectives=section.objectives),)
    return tuple(
        Task(
            key=f"{key}.tasks.{number}",
            name=each.name,
            weight=each.weight,
            dataset=each.dataset,
            loader=each.loader,
            objectives=each.objectives,
        )
        for number, each in enumerate(section.tasks)
    )
