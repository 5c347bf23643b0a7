"""`mmflow score`: a recipe's scores, or any model over any datasets without a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmflow.cli.common import Overrides, Submit, print_artifact, submit_recipe
from mmflow.core.errors import MisuseError

if TYPE_CHECKING:
    from mmflow.recipe import Recipe, ScoreRecipe

Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="embed, caption, …, with commas; all that the model can, by default."),
]


def score(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe's YAML file.")] = None,
    overrides: Overrides = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="URI", help="A dataset, or tars of others; may be given several times.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME@ALIAS|NAME/VERSION|PACKAGE", help="The model, without a recipe.")
    ] = None,
    tasks: Tasks = None,
    output: Annotated[str | None, typer.Option(metavar="URI", help="The workspace, without a recipe.")] = None,
    to: Annotated[
        Literal["lance"] | None, typer.Option("--to", help="Write a Lance dataset too, beside the Parquet files.")
    ] = None,
    submit: Submit = None,
) -> None:
    """Score whole datasets: what a model says of every row. With a recipe: the champion over its own dataset, or what
    its section score says. Without: --dataset, --model and --output."""
    from mmflow.inference.lance_export import check_lance, write_lance
    from mmflow.inference.scores import open_scores
    from mmflow.recipe import Recipe, load_scoring
    from mmflow.report.scores_page import write_scores_page
    from mmflow.stages.loop import Loop
    from mmflow.stages.score import SCORE, score_stage

    if to == "lance":
        check_lance()
    options = {"--dataset": dataset, "--model": model, "--output": output}
    if recipe is not None:
        given = [name for name, value in {**options, "--tasks": tasks}.items() if value]
        if given:
            raise MisuseError(f"{given[0]}: it is for scoring without a recipe; in {recipe} set it under score")
        job: Recipe | ScoreRecipe = load_scoring(recipe, overrides or [])
    else:
        missing = [name for name, value in options.items() if not value]
        if missing:
            raise MisuseError(f"score: {' and '.join(missing)} missing; or give a recipe")
        job = without_recipe(dataset or [], model or "", tasks, output or "")
    if isinstance(job, Recipe):
        loop = Loop(job)
        loop.check(("score",))
        stage = loop.plan("score")
    else:
        stage = score_stage(job.score, job.workspace)
    if submit:
        submit_recipe(submit, "score", stage, job)
    artifact = stage.run(job.workspace)
    print_artifact("score", artifact)
    print(f"  {SCORE.summary(artifact.manifest)}")
    print(f"  {write_scores_page(artifact)}")
    if to == "lance":
        print(f"  {write_lance(open_scores(artifact.uri))}")


def without_recipe(datasets: list[str], model: str, tasks: str | None, output: str) -> ScoreRecipe:
    """The scoring that the options describe. Raises RecipeError for an unknown task."""
    from mmflow.recipe import ScoreRecipe, validated

    sections: dict[str, Any] = {name.strip(): {} for name in tasks.split(",")} if tasks else {}
    score = {"datasets": datasets, "model": model_of(model), "tasks": sections}
    return validated(ScoreRecipe, {"workspace": output, "score": score})


def model_of(text: str) -> dict[str, Any]:
    """NAME@ALIAS, NAME/VERSION, or else a package's URI."""
    name, at, alias = text.partition("@")
    if at and alias and "/" not in text:
        return {"name": name, "alias": alias}
    name, slash, version = text.partition("/")
    if slash and version.isdecimal():
        return {"name": name, "version": int(version)}
    return {"package": text}
