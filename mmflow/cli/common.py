"""What several commands share: their arguments, what they print, and how they are submitted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmflow.core.artifacts import Artifact, Stage
    from mmflow.recipe import Recipe, ScoreRecipe

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings in place of the recipe's.")
]
Submit = Annotated[
    str | None, typer.Option("--submit", metavar="ADDRESS", help="Run as a Ray job there, e.g. http://head:8265.")
]


def read_recipe(path: str, overrides: Sequence[str] | None = None) -> Recipe:
    """The recipe of a file, with overrides."""
    from mmflow.recipe import load_recipe

    return load_recipe(path, overrides or [])


def print_error(line: str) -> None:
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)


def print_artifact(name: str, artifact: Artifact) -> None:
    """A stage's name, whether it was built now, and where its artifact is."""
    print(f"{name}: {'built' if artifact.built else 'already committed'}: {artifact.uri}")


def submit_recipe(address: str, name: str, stage: Stage, recipe: Recipe | ScoreRecipe) -> None:
    """Run a stage of a recipe as a Ray job, and return when it is committed."""
    from mmflow.cluster.jobs import submit_stage
    from mmflow.recipe import dump_recipe

    submit_stage(
        address,
        stage=name,
        identity=stage.identity,
        recipe_text=dump_recipe(recipe),
        code=Path(__file__).parents[2],
        committed=lambda: stage.committed(recipe.workspace) is not None,
        on_line=print_error,
    )
