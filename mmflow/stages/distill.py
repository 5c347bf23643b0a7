"""Stage `distill`: train the student on the same dataset, with the tokenizer and the help of the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmflow.core.artifacts import Stage
from mmflow.core.errors import named
from mmflow.stages import NO_SECTION, Inputs, LoopStage
from mmflow.stages.training import PACKAGE, pretrain_section, summary, training_stage

if TYPE_CHECKING:
    from mmflow.loading.tokens import Vocabulary
    from mmflow.recipe import Recipe
    from mmflow.stages.training import Section


def _check(recipe: Recipe) -> None:
    from mmflow.learning.distillation import check_losses
    from mmflow.models.package import read_config, read_package
    from mmflow.training.check import check_student, check_training

    section, teacher = recipe.distill, pretrain_section(recipe)
    assert section is not None
    check_training("distill", section)
    check_student(teacher, section)
    models = [teacher.model]
    for number, other in enumerate(section.teachers):
        if other.package is not None:
            with named(f"distill.teachers.{number}"):
                models.append(read_config(read_package(other.package)))
    if len(models) == 1 + len(section.teachers):  # what a registered teacher gives is known when the stage looks it up
        check_losses("distill", section.losses, section.model, models)


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.registry.versions import package_uri

    section = recipe.distill
    assert section is not None
    teachers = []
    for number, teacher in enumerate(section.teachers):
        with named(f"distill.teachers.{number}"):
            uri = package_uri(teacher, recipe.workspace)
        teachers.append(teacher.model_copy(update={"package": uri}))
    section = section.model_copy(update={"teachers": teachers})
    return training_stage(recipe, "distill", section, inputs, _vocabulary)


def _vocabulary(section: Section, inputs: Inputs) -> Vocabulary:
    from mmflow.loading.tokens import Vocabulary
    from mmflow.models.package import read_package, read_vocabulary

    return Vocabulary(*read_vocabulary(read_package(inputs["pretrain"].file(PACKAGE))))


DISTILL = LoopStage(
    purpose="Train the smaller student, with the teacher's help.",
    inputs=("shard", "pretrain"),
    absent=lambda recipe: "" if recipe.distill else NO_SECTION,
    check=_check,
    plan=_plan,
    summary=summary,
)
