"""Stage `pretrain`: train the teacher, from scratch, from encoders that others trained, or from a model package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmflow.core.artifacts import Stage
from mmflow.core.errors import MissingArtifactError, RecipeError, named
from mmflow.stages import Inputs, LoopStage
from mmflow.stages.training import pretrain_section, summary, training_stage

if TYPE_CHECKING:
    from mmflow.loading.tokens import Vocabulary
    from mmflow.recipe import Recipe
    from mmflow.stages.training import Section


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with section `pretrain` complete: what the package of `pretrain.start` is made of, and the changes
    that `pretrain.model` lists.

    Raises RecipeError where there is no such package or the model cannot be, CorruptArtifactError for a damaged package
    and TrackingError where the registry does not know the version or cannot be reached.
    """
    from mmflow.training.config import PretrainConfig

    section = recipe.pretrain
    if isinstance(section, PretrainConfig):
        return recipe
    from mmflow.models.config import ModelConfig
    from mmflow.models.package import read_config, read_package
    from mmflow.recipe import validated
    from mmflow.registry.versions import package_uri

    try:
        with named("pretrain.start"):
            uri = package_uri(section.start, recipe.workspace)
            known = read_config(read_package(uri)).model_dump(mode="json")
    except MissingArtifactError as error:
        raise RecipeError(str(error)) from error
    model = validated(ModelConfig, _merged(section.model, known), "pretrain.model")
    complete = PretrainConfig(**{**dict(section), "model": model})
    start = section.start.model_copy(update={"package": uri})
    return recipe.model_copy(update={"pretrain": complete.model_copy(update={"start": start})})


def _merged(changes: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The known settings with the changes, key by key. A part of another kind has no settings in common."""
    if any(changes.get(name, known.get(name)) != known.get(name) for name in ("kind", "type", "checkpoint")):
        return dict(changes)
    return {**known, **{name: _changed(value, known.get(name)) for name, value in changes.items()}}


def _changed(change: Any, known: Any) -> Any:
    return _merged(change, known) if isinstance(change, dict) and isinstance(known, dict) else change


def _check(recipe: Recipe) -> None:
    from mmflow.training.check import check_training  # takes seconds to import

    check_training("pretrain", pretrain_section(recipe))


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    return training_stage(recipe, "pretrain", pretrain_section(recipe), inputs, _vocabulary)


def _vocabulary(section: Section, inputs: Inputs) -> Vocabulary:
    """The vocabulary of the dataset. A model that begins with a package keeps that one's tokenizer, and its classes if
    the dataset has no others."""
    from dataclasses import replace

    from mmflow.dataset.opened import open_dataset
    from mmflow.loading.opening import open_readers
    from mmflow.loading.tokens import Texts, learn_vocabulary
    from mmflow.models.config import VOCABULARY_SIZE
    from mmflow.models.package import read_package, read_vocabulary
    from mmflow.training.check import tokenizer_of
    from mmflow.training.config import PretrainConfig, tasks_of

    data = [
        Texts(
            f"{task.key}.loader",
            # Only texts are read: no frames, no pictures.
            open_readers(
                task.loader.model_copy(update={"frames": 0}), open_dataset(task.dataset or inputs["shard"].uri)
            ),
            task.loader,
        )
        for task in tasks_of("pretrain", section)
    ]
    size = section.model.vocabulary_size or VOCABULARY_SIZE
    learnt = learn_vocabulary(data, size, tokenizer_of("pretrain", section))
    if isinstance(section, PretrainConfig) and section.start is not None:
        _, known = read_vocabulary(read_package(str(section.start.package)))
        if set(learnt.classes) <= set(known):
            return replace(learnt, classes=known)
    return learnt


PRETRAIN = LoopStage(
    purpose="Train the teacher on the dataset: Ray Train and DeepSpeed ZeRO.",
    inputs=("shard",),
    check=_check,
    plan=_plan,
    summary=summary,
)
