"""What `pretrain` and `distill` share: from a section and a dataset to a model package.

    vocabulary ─▶ teachers and their caches ─▶ workers under Ray, their journal mirrored to MLflow ─▶ package

A rerun skips the parts that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmflow.core.artifacts import Stage
from mmflow.core.errors import MisuseError
from mmflow.core.progress import progress
from mmflow.core.storage import exists, join, read_json, write_json
from mmflow.stages import Inputs, Manifest

if TYPE_CHECKING:
    from mmflow.loading.tokens import Vocabulary
    from mmflow.recipe import Recipe
    from mmflow.training.check import Compared
    from mmflow.training.config import DistillConfig, PretrainConfig
    from mmflow.training.job import TrainingJob

    Section = PretrainConfig | DistillConfig

PACKAGE = "package"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"
VOCABULARY = "vocabulary.json"


def pretrain_section(recipe: Recipe) -> PretrainConfig:
    """Section `pretrain` of a recipe that Loop has resolved."""
    from mmflow.training.config import PretrainConfig

    assert isinstance(recipe.pretrain, PretrainConfig)
    return recipe.pretrain


def sections(recipe: Recipe) -> dict[str, Section]:
    """The sections that train a model, by stage."""
    return {"pretrain": pretrain_section(recipe)} | ({"distill": recipe.distill} if recipe.distill else {})


def training_stage(
    recipe: Recipe,
    name: str,
    section: Section,
    inputs: Inputs,
    learn_vocabulary: Callable[[Section, Inputs], Vocabulary],
) -> Stage:
    """The stage that trains `section`. The packages it names must have URIs."""
    fingerprints = {stage: artifact.fingerprint for stage, artifact in inputs.items()} | fingerprints_of(name, section)

    def build(uri: str) -> Manifest:
        lineage: dict[str, Any] = {"stage": name, "identity": uri.rsplit("/", 1)[-1], "recipe": recipe.name}
        return _train(recipe, name, section, inputs, learn_vocabulary, lineage | {"inputs": fingerprints}, uri)

    settings = identity(section) | {"seed": recipe.seed}
    return Stage(name=name, kind="training", version=3, settings=settings, inputs=fingerprints, build=build)


def compare_gradients(trained: Mapping[str, Section], workspace: str) -> Iterator[tuple[str, Compared]]:
    """For each task and objective of the sections, the gradient of their workers beside that of one process, on a small
    model; with the task's key. Raises RecipeError as `check_training`."""
    from mmflow.cluster.local import ensure_ray
    from mmflow.training.check import check_training, small_check
    from mmflow.training.config import tasks_of
    from mmflow.training.workers import compare_gradients_on_ray

    for name, section in trained.items():
        check_training(name, section)
    ensure_ray(max(section.training.most_workers * section.training.cpus_per_worker for section in trained.values()))
    for name, section in trained.items():
        for task in tasks_of(name, section):
            check = small_check(section.model, task.objectives, section.training)
            results = compare_gradients_on_ray(check, join(workspace, "selfcheck"))
            for result in results:
                yield task.key, result


# --- identity -------------------------------------------------------------------------------------------------------


def identity(section: Section) -> dict[str, Any]:
    """The settings that decide the weights. A validation decides them only if it can end the training."""
    from mmflow.models.config import VOCABULARY_SIZE

    settings, validation = section.identity(), section.training.validation
    settings["model"]["vocabulary_size"] = section.model.vocabulary_size or VOCABULARY_SIZE
    del settings["training"]["validation"]
    if validation is not None and validation.patience is not None:
        kept = section.training.checkpoints
        chosen = {"metric": kept.best_metric, "packages_best": kept.keep_best > 0}
        settings["training"]["validation"] = validation.identity() | chosen
    return settings


def fingerprints_of(key: str, section: Section) -> dict[str, str]:
    """Fingerprints of what a section names: datasets, checkpoints and packages. `key` is the recipe's, for errors."""
    from mmflow.core.listing import fingerprint
    from mmflow.loading.opening import open_mixed
    from mmflow.models.package import read_package
    from mmflow.models.pretrained import checkpoint_directory
    from mmflow.training.config import PretrainConfig, tasks_of

    fingerprints = {}
    for task in tasks_of(key, section):
        prefix = f"{task.name} " if task.name else ""
        if task.dataset is not None:
            fingerprints[f"{prefix}dataset"] = open_mixed(f"{task.key}.dataset", task.dataset).fingerprint
        for number, dataset in enumerate(task.loader.mixture.datasets if task.loader.mixture else ()):
            place = f"{task.key}.loader.mixture.datasets.{number}.uri"
            fingerprints[f"{prefix}mixture {number}"] = open_mixed(place, dataset.uri).fingerprint
    for side, encoder in section.model.encoders.items():
        if encoder.checkpoint is not None:
            directory = checkpoint_directory(f"{key}.model.{side}.checkpoint", encoder.checkpoint)
            files = sorted(path.name for path in directory.iterdir() if path.is_file())
            fingerprints[f"{side} checkpoint"] = fingerprint(str(directory), files)
    if isinstance(section, PretrainConfig):
        if section.start is not None:
            fingerprints["start"] = read_package(str(section.start.package)).digest
    else:
        for number, teacher in enumerate(section.teachers):
            fingerprints[f"teacher {number}"] = read_package(str(teacher.package)).digest
    return fingerprints


# --- build ----------------------------------------------------------------------------------------------------------


def _train(
    recipe: Recipe,
    name: str,
    section: Section,
    inputs: Inputs,
    learn_vocabulary: Callable[[Section, Inputs], Vocabulary],
    lineage: dict[str, Any],
    uri: str,
) -> Manifest:
    from mmflow.cluster.local import ensure_ray
    from mmflow.models.package import CARD, read_package
    from mmflow.training.config import PretrainConfig, tasks_of
    from mmflow.training.job import TrainingJob, total_steps

    training, dataset = section.training, inputs["shard"].uri
    tasks = tasks_of(name, section)
    check_held_out(name, section, dataset)
    if not exists(join(uri, PACKAGE, CARD)):  # if the driver was killed after the last step, only the commit is left
        vocabulary = _kept_vocabulary(join(uri, VOCABULARY), lambda: learn_vocabulary(section, inputs))
        job = TrainingJob(
            stage=name,
            dataset=dataset,
            tokenizer_json=vocabulary.tokenizer_json,
            classes=vocabulary.classes,
            model=section.model,
            tasks=tasks,
            training=training,
            seed=recipe.seed,
            package=join(uri, PACKAGE),
            journal=join(uri, JOURNAL),
            checkpoints=join(uri, CHECKPOINTS),
            lineage=lineage,
        )
        ensure_ray(num_cpus=training.least_workers * training.cpus_per_worker)
        if not isinstance(section, PretrainConfig):
            job = _with_teachers(job, recipe.workspace, section, inputs["pretrain"].file(PACKAGE))
        elif section.start is not None:
            start = section.start.model_dump(exclude_none=True, exclude={"package"} if section.start.model else None)
            job = replace(job, start=section.start.package, lora=section.lora, lineage=lineage | {"start": start})
        else:
            job = replace(job, lora=section.lora)
        _run(recipe, section, job, total_steps(tasks, dataset, training), inputs["shard"].fingerprint, uri)
    package = read_package(join(uri, PACKAGE))
    ending = package.card["lineage"]
    return {
        "fingerprint": package.digest,
        "parameters": package.parameters,
        **{name: ending[name] for name in ("steps", "stopped", "packaged_step") if name in ending},
        "global_batch_size": training.global_batch_size,
        "num_workers": training.most_workers,
        "zero_stage": training.zero_stage,
    }


def _run(recipe: Recipe, section: Section, job: TrainingJob, steps: int, dataset: str, uri: str) -> None:
    """Train on Ray while the journal is shown and mirrored to MLflow. `dataset` is its fingerprint."""
    from mmflow.registry.tracking import TrainingRun, mirror, tracking_uri
    from mmflow.training.journal import followed, watch
    from mmflow.training.workers import train_on_ray

    run = TrainingRun(
        experiment=recipe.name,
        name=job.stage,
        identity=str(job.lineage["identity"]),
        params=section.model_dump(mode="json"),
        tags={"mmflow.stage": job.stage, "mmflow.dataset": dataset},
    )
    with (
        progress(job.stage) as report,
        followed(job.journal) as (journal, fetch),
        mirror(journal, run, uri=tracking_uri(recipe.workspace), copy_of=job.journal),
        watch(journal, steps, report),
    ):
        try:
            train_on_ray(job, uri)
        finally:
            fetch()  # the last lines, before the mirror sends what is left


def check_held_out(key: str, section: Section, dataset: str) -> None:
    """Raise MisuseError where a task's dataset lacks the validation split, or a mixture trains on it."""
    from mmflow.dataset.opened import open_dataset
    from mmflow.training.config import tasks_of

    validation, tasks = section.training.validation, tasks_of(key, section)
    if validation is None:
        return
    examined = {open_dataset(task.dataset or dataset).fingerprint for task in tasks}
    for task in tasks:
        for number, other in enumerate(task.loader.mixture.datasets if task.loader.mixture else ()):
            if other.split == validation.split and open_dataset(other.uri).fingerprint in examined:
                raise MisuseError(
                    f"{task.key}.loader.mixture.datasets.{number}.split: {key}.training.validation examines split "
                    f"{validation.split} of {other.uri}; train on another"
                )
        data = open_dataset(task.dataset or dataset)
        if validation.split not in data.splits:
            raise MisuseError(
                f"{key}.training.validation.split: {data.uri} has no split {validation.split!r}; there are "
                f"{', '.join(data.splits)}"
            )


def _kept_vocabulary(uri: str, learn: Callable[[], Vocabulary]) -> Vocabulary:
    """The vocabulary that an earlier run of the stage learnt, so that a restart does not read the whole dataset."""
    from mmflow.loading.tokens import Vocabulary

    if exists(uri):
        kept = read_json(uri)
        return Vocabulary(kept["tokenizer_json"], tuple(kept["classes"]))
    learnt = learn()
    write_json(uri, {"tokenizer_json": learnt.tokenizer_json, "classes": learnt.classes})
    return learnt


def _with_teachers(job: TrainingJob, workspace: str, section: DistillConfig, package: str) -> TrainingJob:
    """The job with its teachers, the one of `pretrain` first, and their caches built."""
    from mmflow.inference.runner import Pool
    from mmflow.inference.teacher_cache import with_caches
    from mmflow.loading.tokens import read_tokenizer
    from mmflow.training.job import TeacherPackage

    others = [TeacherPackage(package=str(teacher.package), weight=teacher.weight) for teacher in section.teachers]
    teachers = (TeacherPackage(package=package), *others)
    if section.cache is not None:
        with progress("cache") as report:
            teachers = with_caches(
                teachers,
                cache=section.cache,
                dataset=job.dataset,
                loader=section.loader,
                tokenizer=read_tokenizer(job.tokenizer_json),
                max_tokens=job.model.max_tokens,
                seed=job.seed,
                workspace=workspace,
                pool=Pool(num_workers=job.training.most_workers, cpus_per_worker=job.training.cpus_per_worker),
                progress=report,
            )
    return replace(
        job,
        teachers=teachers,
        losses=section.losses,
        initialise=section.initialise,
        stored_views=section.cache.augmentations if section.cache else 0,
    )


def summary(manifest: Manifest) -> str:
    """One line about a committed training."""
    millions = manifest["parameters"] / 1e6
    return f"{millions:.2f}M parameters, {manifest['steps']:,} steps on {manifest['num_workers']} workers"
