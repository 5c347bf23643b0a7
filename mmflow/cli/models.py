"""`mmflow models …`: the versions in the registry, and model packages from and to the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmflow.cli.common import read_recipe
from mmflow.core.errors import MmflowError

if TYPE_CHECKING:
    from mmflow.recipe import Recipe
    from mmflow.registry.versions import Version

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart.yaml"
RecipeOption = Annotated[str, typer.Option("--recipe", metavar="RECIPE", help="The recipe with model and workspace.")]
PackageUri = Annotated[str, typer.Argument(metavar="PACKAGE", help="A model package's directory or URI.")]

models = typer.Typer(
    no_args_is_help=True,
    help="Versions of a model: list, show, rollback. Model packages from and to other formats: import, export.",
)


def _versions(recipe: Recipe) -> tuple[Version, ...]:
    from mmflow.registry.tracking import tracking_uri
    from mmflow.registry.versions import list_versions

    return list_versions(recipe.promote.model, uri=tracking_uri(recipe.workspace))


@models.command("list", epilog="Example: mmflow models list --recipe pipelines/quickstart.yaml")
def models_list(recipe: RecipeOption = str(QUICKSTART)) -> None:
    """List the versions of the recipe's model: number, aliases, time, and the deciding metric."""
    loaded = read_recipe(recipe)
    metric = loaded.promote.metric
    for version in _versions(loaded):
        value = f"{version.metrics[metric]:.4f}" if metric in version.metrics else "?"
        aliases = ", ".join(version.aliases) or "-"
        print(f"{version.version}\t{aliases}\t{version.created:%Y-%m-%d %H:%M}\t{metric} {value}")


@models.command("show", epilog="Example: mmflow models show 1 --recipe pipelines/quickstart.yaml")
def models_show(version: int, recipe: RecipeOption = str(QUICKSTART)) -> None:
    """Show one version: its package, digest, lineage and metrics."""
    loaded = read_recipe(recipe)
    versions = {version.version: version for version in _versions(loaded)}
    if version not in versions:
        raise MmflowError(f"{loaded.promote.model}: no version {version}; there are {sorted(versions) or 'none'}")
    shown = versions[version]
    facts = {"package": shown.package_uri, "digest": shown.digest, "aliases": ", ".join(shown.aliases), **shown.tags}
    for name, value in [*facts.items(), *sorted(shown.metrics.items())]:
        print(f"{name}\t{value}")


@models.command("rollback", epilog='Example: mmflow models rollback "complaints since Tuesday"')
def models_rollback(reason: str, recipe: RecipeOption = str(QUICKSTART)) -> None:
    """Make the previous champion champion again, and keep the reason."""
    from mmflow.registry.tracking import tracking_uri
    from mmflow.registry.versions import rollback

    loaded = read_recipe(recipe)
    version = rollback(loaded.promote.model, reason, uri=tracking_uri(loaded.workspace))
    print(f"{loaded.promote.model}: version {version.version} is champion again")


@models.command("import", epilog="Example: mmflow models import downloads/clip-vit-base-patch32 workspace/clip")
def models_import(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A directory that transformers' save_pretrained wrote.")
    ],
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="The new package's directory or URI.")],
) -> None:
    """Make a model package of a CLIP, SigLIP or VisionTextDualEncoder: weights, tokenizer and image processor."""
    from mmflow.models.importing import import_checkpoint

    made = import_checkpoint(package, checkpoint)
    print(f"{made.uri}: {made.card['lineage']['imported']}, {made.parameters:,} parameters, digest {made.digest}")


@models.command("export", epilog="Example: mmflow models export workspace/clip exported/clip --format onnx")
def models_export(
    package: PackageUri,
    directory: Annotated[str, typer.Argument(metavar="DIRECTORY", help="A new directory.")],
    to: Annotated[
        Literal["transformers", "onnx"],
        typer.Option("--format", help="A directory for from_pretrained, or the two towers as ONNX graphs."),
    ] = "transformers",
) -> None:
    """Write a package's dual encoder for other tools, unless its outputs would differ from the package's."""
    from mmflow.models.package import load_package, read_package

    loaded = load_package(read_package(package))
    if to == "transformers":
        from mmflow.models.exporting import export_transformers

        exported = export_transformers(loaded, directory)
        print(f"{directory}: {exported.layout}, logits differ by {exported.difference:.1e} at most")
    else:
        from mmflow.models.exporting import export_onnx

        for name, difference in export_onnx(loaded, directory).items():
            print(f"{directory}/{name}: embeddings differ by {difference:.1e} at most")
