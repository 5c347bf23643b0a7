"""Stage `corpus`: draw the demonstration corpora that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmflow.core.artifacts import Stage
from mmflow.core.errors import RecipeError
from mmflow.core.progress import progress
from mmflow.core.storage import local_path
from mmflow.stages import NO_SECTION, Inputs, LoopStage, Manifest

if TYPE_CHECKING:
    from mmflow.recipe import Recipe


def _check(recipe: Recipe) -> None:
    if local_path(recipe.workspace) is None:
        raise RecipeError(f"corpus: a demonstration corpus needs a local workspace, not {recipe.workspace}")


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.corpora import corpora_of, identity, write_corpora

    assert recipe.corpus is not None
    corpora = corpora_of(recipe.corpus)

    def build(uri: str) -> Manifest:
        with progress("corpus") as report:
            return write_corpora(Path(uri), corpora, report)

    return Stage(name="corpus", kind="corpus", version=1, settings=identity(corpora), build=build)


CORPUS = LoopStage(
    purpose="Draw the demonstration corpora that the recipe names.",
    absent=lambda recipe: "" if recipe.corpus else NO_SECTION,
    check=_check,
    plan=_plan,
    summary=lambda manifest: f"{manifest['records']:,} records",
)
