"""The loop's stages: what each takes, what it makes, and how it is told apart from another of its kind.

    corpus ─▶ shard ─▶ pretrain ─▶ distill ─▶ evaluate ─▶ promote ─▶ score

Packages below know how; this file alone knows the order. Each function returns a `Stage` that builds nothing until run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmflow.core.artifacts import MANIFEST, Artifact, Stage, read_artifact
from mmflow.core.errors import MissingArtifactError, MisuseError, RecipeError, named
from mmflow.core.progress import progress
from mmflow.core.storage import exists, join, local_path
from mmflow.recipe import Recipe, settings_of
from mmflow.stages.training import PACKAGE, Inputs, Section, distill, pretrain, started


@dataclass(frozen=True)
class Definition:
    """A stage of the loop as a recipe may have it."""

    inputs: tuple[str, ...]  # the stages whose artifacts it takes, where the recipe has them
    make: Callable[[Recipe, Inputs], Stage]
    purpose: str
    before: Callable[[Recipe, Inputs], None] | None = None  # what is to be done before the stage can tell its inputs


class Loop:
    """The stages that a recipe has. An artifact found or built once is remembered for as long as the object lives."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._absent = {
            name: "this recipe has no such section" for name in ("corpus", "distill") if getattr(recipe, name) is None
        }
        candidate = recipe.distill if recipe.promote.candidate == "student" else recipe.pretrain
        if candidate is not None and "embeddings" not in candidate.model.gives:
            why = "model.video is tight" if candidate.model.tight else "model.embedding_width is null"
            self._absent["score"] = f"the candidate has no space to compare in: its {why}"
        self.stages = tuple(name for name in DEFINITIONS if name not in self._absent)
        self._artifacts: dict[str, Artifact] = {}

    def check(self, stages: Collection[str] | None = None) -> None:
        """Find what is wrong with the recipe before any of the stages (all where none is named) makes anything.

        Raises RecipeError naming the key. What only the data can tell, such as a split that no record has, is found by
        the stage that reads it.
        """
        from mmflow.core.listing import find

        stages = self.stages if stages is None else stages
        for number, source in enumerate(self.recipe.shard.sources):
            try:
                find(source.uri)
            except MisuseError as error:
                raise RecipeError(f"shard.sources.{number}.uri: {error}") from error
        trained: dict[str, Section] = {"pretrain": started(self.recipe)}
        if self.recipe.distill is not None:
            trained["distill"] = self.recipe.distill
        for name in (each for each in trained if each in stages):
            from mmflow.training.check import check_training  # seconds of imports, which sharding can do without

            check_training(name, trained[name])
        if self.recipe.distill is not None and "distill" in stages:
            from mmflow.learning.distillation.check import check_losses
            from mmflow.models.package import read_config, read_package
            from mmflow.training.check import check_student

            check_student(started(self.recipe), self.recipe.distill)
            known = []
            others = self.recipe.distill.teachers
            for number, teacher in enumerate(others):
                if teacher.package is not None:
                    with named(f"distill.teachers.{number}"):
                        known.append(read_config(read_package(teacher.package)))
            if len(known) == len(others):  # what a registered teacher can give is known when the stage looks it up
                teachers = [self.recipe.pretrain.model, *known]
                check_losses("distill", self.recipe.distill.losses, self.recipe.distill.model, teachers)
        if not {*trained, "evaluate"}.isdisjoint(stages):
            from mmflow.evaluation.asked import check_evaluation

            check_evaluation(self.recipe.evaluate, trained)

    def inputs_of(self, name: str) -> tuple[str, ...]:
        """The stages that `name` takes artifacts from."""
        return tuple(each for each in DEFINITIONS[name].inputs if each in self.stages)

    def plan(self, name: str) -> Stage:
        """The stage, ready to run. Raises MissingArtifactError where a stage before it is not committed."""
        if name not in self.stages:
            raise RecipeError(f"{name}: {self._absent[name]}")
        return DEFINITIONS[name].make(self.recipe, {each: self.committed(each) for each in self.inputs_of(name)})

    def committed(self, name: str) -> Artifact:
        """The artifact that a stage has committed. Raises MissingArtifactError naming what to run."""
        if name not in self._artifacts:
            stage = self.plan(name)
            uri = stage.directory(self.recipe.workspace)
            if not exists(join(uri, MANIFEST)):
                raise MissingArtifactError(
                    f"{uri}: stage {name} is not committed for this recipe; run `mmflow {name} …` first, or the whole "
                    "loop with `mmflow run …`"
                )
            self._artifacts[name] = read_artifact(uri, stage.kind)
        return self._artifacts[name]

    def run(self, name: str) -> Artifact:
        """The stage's artifact, built now if it was not there, and before a dataset the corpora that it is made of."""
        if name == "shard" and "corpus" in self.stages and "corpus" not in self._artifacts:
            self.run("corpus")
        before = DEFINITIONS[name].before if name in self.stages else None
        if before is not None:
            before(self.recipe, {each: self.committed(each) for each in self.inputs_of(name)})
        self._artifacts[name] = self.plan(name).run(self.recipe.workspace)
        return self._artifacts[name]


# --- corpus ---------------------------------------------------------------------------------------------------------


def _corpus(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.corpora.corpora import corpora_of, identity, write_corpora

    assert recipe.corpus is not None
    corpora = corpora_of(recipe.corpus)

    def build(uri: str) -> Mapping[str, Any]:
        directory = local_path(uri)
        if directory is None:
            raise MisuseError(f"{uri}: a demonstration corpus is drawn on a local disk; use a local workspace")
        with progress("corpus") as report:
            return write_corpora(directory, corpora, report)

    return Stage(name="corpus", kind="corpus", version=1, settings=identity(corpora), build=build)


# --- shard ----------------------------------------------------------------------------------------------------------


def _shard(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.corpora.corpora import corpora_of, sources_of
    from mmflow.dataset.grow import SOURCES, settings_of_build
    from mmflow.dataset.stage import FETCHED, inputs_of_evaluation, inputs_of_sources

    settings = recipe.shard
    sources = settings.sources
    if recipe.corpus is not None:
        sources = sources_of(inputs["corpus"].uri, corpora_of(recipe.corpus))
        fingerprints = {"corpus": inputs["corpus"].fingerprint}
    else:
        fingerprints = inputs_of_sources(sources, recipe.workspace)
    fingerprints |= inputs_of_evaluation(settings)

    def build(uri: str) -> Mapping[str, Any]:
        from mmflow.cluster.local import ensure_ray
        from mmflow.dataset import stage

        ensure_ray(num_cpus=1)
        with progress("shard") as report:
            return stage.build(
                uri,
                sources=sources,
                settings=settings,
                fetched=join(recipe.workspace, FETCHED) if "fetched" in fingerprints else None,
                inputs={name: value for name, value in fingerprints.items() if name != SOURCES},
                progress=report,
            )

    def tidy(uri: str) -> None:
        from mmflow.cleaning.pieces import remove_pieces

        remove_pieces(uri)

    settings_json = settings_of_build(settings)
    return Stage(
        name="shard", kind="dataset", version=3, settings=settings_json, inputs=fingerprints, build=build, tidy=tidy
    )


def _fetch(recipe: Recipe, inputs: Inputs) -> None:
    from mmflow.cluster.local import ensure_ray
    from mmflow.dataset.stage import fetch

    if "corpus" not in inputs:
        with progress("fetch") as report:
            fetch(recipe.shard.sources, recipe.workspace, recipe.shard, partial(ensure_ray, num_cpus=1), report)


# --- evaluate, promote, score ---------------------------------------------------------------------------------------


def _evaluate(recipe: Recipe, inputs: Inputs) -> Stage:
    def build(uri: str) -> Mapping[str, Any]:
        from mmflow.evaluation.stage import evaluate_models

        packages = {
            model: inputs[stage].file(PACKAGE)
            for model, stage in (("teacher", "pretrain"), ("student", "distill"))
            if stage in inputs
        }
        with progress("evaluate") as report:
            return evaluate_models(
                uri,
                dataset=inputs["shard"].uri,
                packages=packages,
                settings=recipe.evaluate,
                seed=recipe.seed,
                progress=report,
            )

    fingerprints = {each: artifact.fingerprint for each, artifact in inputs.items()}
    settings = {**settings_of(recipe.evaluate), "seed": recipe.seed}
    return Stage(name="evaluate", kind="evaluation", version=2, settings=settings, inputs=fingerprints, build=build)


def _promote(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.registry.tracking import tracking_uri, without_credentials

    candidate = inputs["distill" if recipe.promote.candidate == "student" else "pretrain"]
    tracking = tracking_uri(recipe.workspace)

    def build(uri: str) -> Mapping[str, Any]:
        from mmflow.registry.promote import promote_candidate

        return promote_candidate(
            uri,
            tracking=tracking,
            settings=recipe.promote,
            evaluation=inputs["evaluate"].uri,
            package=candidate.file(PACKAGE),
            dataset=inputs["shard"].uri,
            examination=recipe.evaluate,
        )

    fingerprints = {each: artifact.fingerprint for each, artifact in inputs.items()}
    # A registry in the workspace moves with it; one elsewhere is named, because a version there is not one here.
    registry = "workspace" if tracking.startswith("sqlite:") else without_credentials(tracking)
    settings = {**settings_of(recipe.promote), "registry": registry}
    return Stage(name="promote", kind="promotion", version=1, settings=settings, inputs=fingerprints, build=build)


def _score(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.registry.tracking import tracking_uri
    from mmflow.registry.versions import champion

    name = recipe.promote.model
    tracking = tracking_uri(recipe.workspace)
    found = champion(name, uri=tracking)
    if found is None:
        raise MissingArtifactError(f"{name}: no version holds the champion alias, so there is nothing to score with")
    zero_shot = recipe.evaluate.zero_shot
    prompts = zero_shot.texts if zero_shot else {}
    language = recipe.evaluate.languages[0]

    def build(uri: str) -> Mapping[str, Any]:
        from mmflow.cluster.local import ensure_ray
        from mmflow.inference.score import score_dataset

        ensure_ray(num_cpus=recipe.score.num_workers * recipe.score.cpus_per_worker)
        with progress("score") as report:
            return score_dataset(
                uri,
                dataset=inputs["shard"].uri,
                package=found.package_uri,
                version=found.version,
                prompts=prompts,
                language=language,
                settings=recipe.score,
                progress=report,
            )

    return Stage(
        name="score",
        kind="scores",
        version=1,
        settings={"prompts": prompts, "language": language},
        inputs={"shard": inputs["shard"].fingerprint, "model": found.digest},
        build=build,
    )


DEFINITIONS: Mapping[str, Definition] = {
    "corpus": Definition((), _corpus, "Draw the demonstration corpora that the recipe names."),
    "shard": Definition(("corpus",), _shard, "Clean a corpus and shard it into a dataset of WebDataset tars.", _fetch),
    "pretrain": Definition(("shard",), pretrain, "Train the teacher on the dataset."),
    "distill": Definition(("shard", "pretrain"), distill, "Train the smaller student, with the teacher's help."),
    "evaluate": Definition(
        ("shard", "pretrain", "distill"), _evaluate, "Examine teacher, student and an untrained model on held-out rows."
    ),
    "promote": Definition(
        ("shard", "pretrain", "distill", "evaluate"),
        _promote,
        "Register the candidate, and make it champion if the gate holds.",
    ),
    "score": Definition(("shard", "promote"), _score, "Score the whole dataset with the champion."),
}
