"""Stage `score`: what a model says of every row of whole datasets, by default the champion of the recipe's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmflow.core.artifacts import Stage, content_hash
from mmflow.core.errors import MissingArtifactError, MisuseError, RecipeError, named
from mmflow.core.progress import progress
from mmflow.core.storage import join, split_query, write_json
from mmflow.stages import Inputs, LoopStage, Manifest
from mmflow.stages.evaluate import MODELS, RESULTS

if TYPE_CHECKING:
    from mmflow.dataset.opened import Dataset
    from mmflow.inference.config import ModelReference, ScoreConfig
    from mmflow.inference.tasks.zero_shot import ZeroShot
    from mmflow.models.config import ModelConfig
    from mmflow.recipe import Recipe

TAR, TRAIN = ".tar", "train"  # tars of others have no splits
SQLITE = "sqlite:///"


def score_stage(
    settings: ScoreConfig,
    workspace: str,
    *,
    own: Sequence[str] = (),
    model_name: str | None = None,
    zero_shot: ZeroShot | None = None,
    language: str = "en",
) -> Stage:
    """The stage that scores `settings.datasets`, or the datasets in `own`.

    Without tasks in the settings the model does all that it can: `zero_shot` are the classes that it tells apart, and
    `language` is that of the captions. Raises RecipeError for what the model cannot do, MissingArtifactError where a
    dataset or the model is not there.
    """
    from mmflow.inference.config import check_tasks, possible_tasks
    from mmflow.inference.runner import Model
    from mmflow.inference.score import Scored, score
    from mmflow.inference.scores import KIND, LATEST
    from mmflow.models.package import read_config, read_package

    package, version, name = _package(settings.model, workspace, model_name)
    config = read_config(read_package(package))
    tasks = settings.tasks if settings.tasks.named else possible_tasks(config.gives, zero_shot, language)
    check_tasks(tasks, config, f"the model at {package}")
    model = Model(package=package)
    if tasks.neighbours is not None:
        with named("score.tasks.neighbours"):
            tasks.neighbours.check(model.digest)
    datasets = _datasets(settings.datasets or own, settings.splits or (), workspace)
    scored = Scored(
        model=model,
        datasets=tuple((name, dataset.uri) for name, dataset in datasets.items()),
        tasks=tasks,
        splits=None if settings.splits is None else tuple(settings.splits),
    )

    def build(uri: str) -> Manifest:
        from mmflow.cluster.local import ensure_ray

        ensure_ray(num_cpus=(settings.num_workers or 1) * settings.cpus_per_worker)
        with progress("score") as report:
            made = score(uri, join(workspace, RESULTS), scored, settings, report)
        write_json(join(workspace, *LATEST), {"uri": uri})
        return {"model": {"name": name, "version": version, "digest": model.digest, "package": package}, **made}

    return Stage(
        name="score",
        kind=KIND,
        version=2,
        settings={"tasks": [result.settings for result in tasks.results], "splits": settings.splits}
        | ({"width": tasks.embed.width} if tasks.embed else {}),
        inputs={f"dataset {name}": dataset.fingerprint for name, dataset in datasets.items()} | {"model": model.digest},
        build=build,
    )


def _package(model: ModelReference, workspace: str, name: str | None) -> tuple[str, int | None, str | None]:
    """(package, version, name) of a model; without a version and a name where the package itself was given."""
    from mmflow.registry.tracking import tracking_uri
    from mmflow.registry.versions import held_by, list_versions

    if model.package is not None:
        return model.package, None, None
    name = model.name or name
    if name is None:
        raise RecipeError("score.model.name: missing; which registered model is it?")
    tracking = tracking_uri(workspace)
    if tracking.startswith(SQLITE) and not Path(tracking.removeprefix(SQLITE)).exists():  # it would be created
        raise MissingArtifactError(
            f"{name}: no model is registered at {tracking}; set MLFLOW_TRACKING_URI to the registry, or name a package"
        )
    if model.alias is not None:
        version = held_by(name, model.alias, uri=tracking)
        if version is None:
            raise MissingArtifactError(f"{name}: no version has the {model.alias} alias; promote one first")
        return version.package_uri, version.version, name
    versions = {version.version: version for version in list_versions(name, uri=tracking)}
    if model.version not in versions:
        raise MissingArtifactError(f"{name}: no version {model.version}; there are {sorted(versions) or 'none'}")
    return versions[model.version].package_uri, model.version, name


def _datasets(uris: Sequence[str], splits: Sequence[str], workspace: str) -> dict[str, Dataset]:
    """The datasets by name. Tars that others wrote are indexed, when all datasets and splits are known to be there."""
    from mmflow.dataset.adopt import adopt, list_tars
    from mmflow.dataset.opened import open_dataset

    names = _names(uris)
    tars = {uri: list_tars([uri]) for uri in uris if uri.endswith(TAR)}
    if tars and set(splits) - {TRAIN}:
        raise MisuseError(f"score.splits: {', '.join(splits)}: all tars of others are of split {TRAIN}")
    datasets = {uri: open_dataset(uri) for uri in uris if uri not in tars}
    for dataset in datasets.values():
        for split in splits:
            dataset.shards(split)
    for uri, listed in tars.items():
        contents = content_hash([(tar.uri, tar.size, tar.modified) for tar in listed])
        adopted = join(workspace, "adopted", contents[:16])
        with progress("adopt") as report:
            adopt(adopted, [uri], captions_required=False, progress=lambda done, total: report(done, total, "tars"))
        datasets[uri] = open_dataset(adopted)
    return {name: datasets[uri] for name, uri in zip(names, uris, strict=True)}


def _names(uris: Sequence[str]) -> list[str]:
    """A name for each dataset: the last parts of its path, or of the folder of its tars, that tell it from the others.
    Raises MisuseError for one that is given twice."""
    paths = [split_query(uri)[0].rstrip("/").split("/") for uri in uris]
    folders = [path[:-1] if path[-1].endswith(TAR) else path for path in paths]
    for length in range(1, max(map(len, folders)) + 1):
        names = [re.sub(r"[^\w.-]+", "-", "-".join(folder[-length:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise MisuseError(f"score.datasets: {', '.join(uris)}: name each dataset, and each folder of tars, once")


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    return score_stage(
        recipe.score,
        recipe.workspace,
        own=[inputs["shard"].uri],
        model_name=recipe.promote.model,
        zero_shot=_zero_shot(recipe),
        language=recipe.evaluate.languages[0],
    )


def _own_model(recipe: Recipe) -> tuple[str, ModelConfig] | None:
    """The key and the settings of the recipe's own model, if it is the one that scores."""
    from mmflow.stages.training import sections

    if recipe.score.model.package is not None or recipe.score.model.name not in (None, recipe.promote.model):
        return None
    key = MODELS[recipe.promote.candidate]
    return f"{key}.model", sections(recipe)[key].model


def _absent(recipe: Recipe) -> str:
    from mmflow.inference.config import possible_tasks

    own = _own_model(recipe)
    if own is None or recipe.score.tasks.named or possible_tasks(own[1].gives, _zero_shot(recipe), "en").named:
        return ""
    return f"{own[0]} can do no task without settings, and score.tasks names none"


def _check(recipe: Recipe) -> None:
    """Refuse tasks that the recipe's own model cannot do, before it is trained."""
    from mmflow.inference.config import check_tasks

    own = _own_model(recipe)
    if own is not None and recipe.score.tasks.named:
        check_tasks(recipe.score.tasks, own[1], own[0])


def _zero_shot(recipe: Recipe) -> ZeroShot | None:
    return recipe.evaluate.zero_shot.task if recipe.evaluate.zero_shot else None


SCORE = LoopStage(
    purpose="Score whole datasets: what a model, by default the champion, says of every row.",
    inputs=("shard", "promote"),
    absent=_absent,
    check=_check,
    plan=_plan,
    summary=lambda manifest: (
        f"{manifest['totals']['rows']:,} rows by {manifest['model']['name'] or manifest['model']['package']}"
        f"{' ' + str(manifest['model']['version']) if manifest['model']['version'] else ''}: "
        f"{', '.join(manifest['tasks'])}"
        + (f"; {manifest['totals']['errors']:,} failed" if manifest["totals"]["errors"] else "")
    ),
)
