"""Stage `corpus`: draw the demonstration corpora that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmflow.core.artifacts import Stage
from mmflow.core.errors import RecipeError
from mmflow.core.progress import progress
from mmflow.core.storage import local_path
from mmflow.stages import Inputs, LoopStage, Manifest

if TYPE_CHECKING:
    from mmflow.recipe import Recipe


def _absent(recipe: Recipe) -> str:
    return "this recipe has no such section" if recipe.corpus is None else ""


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


def _summary(manifest: Manifest) -> str:
    return f"{manifest['records']:,} records"


CORPUS = LoopStage(
    purpose="Draw the demonstration corpora that the recipe names.",
    absent=_absent,
    check=_check,
    plan=_plan,
    summary=_summary,
)
