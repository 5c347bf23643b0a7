"""The two stages of the loop that train: from a section and a dataset to a package, and all that stands around it.

    vocabulary ─▶ teachers and their caches ─▶ workers under Ray, their journal mirrored to MLflow ─▶ package

A run that finds any of it done goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mmflow.core.artifacts import Artifact, Stage
from mmflow.core.errors import named
from mmflow.core.progress import progress
from mmflow.core.storage import exists, join
from mmflow.recipe import Recipe, settings_of
from mmflow.training.config import DistillConfig, PretrainConfig

if TYPE_CHECKING:
    from mmflow.loading.tokens import Vocabulary
    from mmflow.training.job import TrainingJob

Inputs = Mapping[str, Artifact]
Section = PretrainConfig | DistillConfig
PACKAGE = "package"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"
VOCABULARY = "vocabulary.json"


def pretrain(recipe: Recipe, inputs: Inputs) -> Stage:
    """The teacher's training, on the dataset that stage `shard` made."""

    def vocabulary(section: Section) -> Vocabulary:
        from mmflow.training.stage import vocabulary_of_data

        return vocabulary_of_data("pretrain", section, inputs["shard"].uri)

    return _training_stage(recipe, "pretrain", started(recipe), inputs, vocabulary)


def started(recipe: Recipe) -> PretrainConfig:
    """Section `pretrain`, with the URI of the package that it begins with where a registered version was named."""
    from mmflow.registry.versions import located

    start = recipe.pretrain.start
    if start is None:
        return recipe.pretrain
    with named("pretrain.start"):
        return recipe.pretrain.model_copy(update={"start": located(start, recipe.workspace)})


def distill(recipe: Recipe, inputs: Inputs) -> Stage:
    """The student's training, on the same dataset, with the tokenizer of the package that `pretrain` made."""
    from mmflow.registry.versions import located

    assert recipe.distill is not None
    section = recipe.distill
    teachers = []
    for number, teacher in enumerate(section.teachers):
        with named(f"distill.teachers.{number}"):
            teachers.append(located(teacher, recipe.workspace))

    def vocabulary(section: Section) -> Vocabulary:
        from mmflow.loading.tokens import Vocabulary
        from mmflow.models.package import read_package, read_vocabulary

        return Vocabulary(*read_vocabulary(read_package(inputs["pretrain"].file(PACKAGE))))

    return _training_stage(recipe, "distill", section.model_copy(update={"teachers": teachers}), inputs, vocabulary)


def _training_stage(
    recipe: Recipe,
    name: str,
    section: Section,
    inputs: Inputs,
    vocabulary: Callable[[Section], Vocabulary],
) -> Stage:
    from mmflow.training.stage import identity, with_absolute_paths

    settings, elsewhere = identity(name, section)
    fingerprints = {each: artifact.fingerprint for each, artifact in inputs.items()} | elsewhere
    settings["seed"] = recipe.seed
    build = partial(_train, recipe, name, with_absolute_paths(section), inputs, fingerprints, vocabulary)
    return Stage(name=name, kind="training", version=2, settings=settings, inputs=fingerprints, build=build)


def _train(
    recipe: Recipe,
    name: str,
    section: Section,
    inputs: Inputs,
    fingerprints: Mapping[str, str],
    vocabulary: Callable[[Section], Vocabulary],
    uri: str,
) -> Mapping[str, Any]:
    from mmflow.cluster.local import ensure_ray
    from mmflow.models.package import CARD, read_package
    from mmflow.registry.tracking import TrainingRun, mirror, tracking_uri
    from mmflow.training.config import tasks_of
    from mmflow.training.job import TrainingJob, total_steps
    from mmflow.training.journal import followed, watch
    from mmflow.training.stage import check_held_out, kept_vocabulary
    from mmflow.training.workers import train_on_ray

    training = section.training
    tasks = tasks_of(name, section)
    check_held_out(name, tasks, inputs["shard"].uri, training.validation)
    steps = total_steps(tasks, inputs["shard"].uri, training)
    lineage = {
        "stage": name,
        "identity": uri.rsplit("/", 1)[-1],
        "recipe": recipe.name,
        "inputs": dict(fingerprints),
    }
    start = section.start if isinstance(section, PretrainConfig) else None
    if start is not None and recipe.pretrain.start is not None:
        lineage["start"] = recipe.pretrain.start.model_dump(exclude_none=True)
    if not exists(join(uri, PACKAGE, CARD)):  # a driver killed after the last step has only the commit left to do
        learnt = kept_vocabulary(join(uri, VOCABULARY), partial(vocabulary, section))
        job = TrainingJob(
            stage=name,
            dataset=inputs["shard"].uri,
            tokenizer_json=learnt.tokenizer_json,
            classes=learnt.classes,
            model=section.model,
            loader=section.loader,
            objectives=section.objectives,
            training=training,
            seed=recipe.seed,
            start=None if start is None else start.package,
            lora=section.lora if isinstance(section, PretrainConfig) else None,
            several=tasks if len(tasks) > 1 else (),
            package=join(uri, PACKAGE),
            journal=join(uri, JOURNAL),
            checkpoints=join(uri, CHECKPOINTS),
            lineage=lineage,
        )
        ensure_ray(num_cpus=training.least_workers * training.cpus_per_worker)
        if isinstance(section, DistillConfig):
            job = _with_teachers(job, recipe.workspace, section, inputs["pretrain"].file(PACKAGE))
        run = TrainingRun(
            experiment=recipe.name,
            name=name,
            identity=str(lineage["identity"]),
            params=settings_of(section),
            tags={"mmflow.stage": name, "mmflow.dataset": inputs["shard"].fingerprint},
        )
        with (
            progress(name) as report,
            followed(job.journal) as (journal, fetch),
            mirror(journal, run, uri=tracking_uri(recipe.workspace), copy_of=job.journal),
            watch(journal, steps, report),
        ):
            try:
                train_on_ray(job, uri)
            finally:
                fetch()  # before its last lines are sent
    package = read_package(join(uri, PACKAGE))
    # A package of an earlier version does not say how many steps it took.
    ending: dict[str, Any] = {"steps": steps, **package.card["lineage"]}
    return {
        "fingerprint": package.digest,
        "parameters": package.parameters,
        **{name: ending[name] for name in ("steps", "stopped", "packaged_step") if name in ending},
        "global_batch_size": training.global_batch_size,
        "num_workers": training.most_workers,
        "zero_stage": training.zero_stage,
    }


def _with_teachers(job: TrainingJob, workspace: str, section: DistillConfig, package: str) -> TrainingJob:
    """The job with the teachers of a stage, the one that `pretrain` trained first, their caches built."""
    from mmflow.inference.teacher_cache import with_caches
    from mmflow.loading.tokens import read_tokenizer
    from mmflow.training.job import TeacherPackage

    teachers = (
        TeacherPackage(package=package),
        *(TeacherPackage(package=str(each.package), weight=each.weight) for each in section.teachers),
    )
    if section.cache is not None:
        with progress("cache") as report:
            teachers = with_caches(
                teachers,
                key="distill.cache",
                cache=section.cache,
                dataset=job.dataset,
                loader=job.loader,
                tokenizer=read_tokenizer(job.tokenizer_json),
                max_tokens=job.model.max_tokens,
                seed=job.seed,
                workspace=workspace,
                num_workers=job.training.most_workers,
                cpus_per_worker=job.training.cpus_per_worker,
                progress=report,
            )
    return replace(
        job,
        teachers=teachers,
        losses=section.losses,
        initialise=section.initialise,
        stored_views=section.cache.augmentations if section.cache else 0,
    )
