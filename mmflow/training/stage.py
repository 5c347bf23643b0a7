"""What tells one training from another before it begins, and what it learns of its data first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from mmflow.core.errors import MisuseError
from mmflow.core.listing import fingerprint
from mmflow.core.storage import exists, local_path, read_json, write_json
from mmflow.dataset.opened import open_dataset
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import open_mixed, open_readers
from mmflow.loading.tokens import Texts, Vocabulary, learn_vocabulary, load_tokenizer, read_tokenizer
from mmflow.models.checkpoints import IN_PACKAGE, checkpoint_directory
from mmflow.models.config import VOCABULARY_SIZE, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from mmflow.models.package import read_package, read_vocabulary
from mmflow.training.config import DistillConfig, PretrainConfig, Task, ValidationConfig, tasks_of

Section = PretrainConfig | DistillConfig
# How batches are prepared, by how many workers, in what memory, and when a run stops: a remedy that an error names must
# go on from the last checkpoint, not begin anew.
OPERATIONAL = {
    "loader": {"workers", "prefetch_batches", "cache", "on_corrupt", "max_skipped"},
    "training": {
        "num_workers",
        "cpus_per_worker",
        "micro_batch_size",
        "offload_optimizer",
        "compile",
        "max_restarts",
        "log_every_steps",
        "peak_tflops",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "checkpoints",
        "guards",
    },
}
# What a recipe could not say once. Where it says nothing of these it is the recipe that it was.
LATER = {"ema_decay": None, "name": "adamw", "schedule": "cosine", "decay_share": None}


def identity(key: str, section: Section) -> tuple[dict[str, Any], dict[str, str]]:
    """What of a section decides about the weights, and the fingerprints of what it names that lies elsewhere, which is
    known by its content. `key` is the recipe's, for errors."""
    settings = section.model_dump(mode="json", exclude=OPERATIONAL)
    settings.pop("start", None)
    settings.pop("tasks", None)
    if settings.get("lora") is None:
        settings.pop("lora", None)
    settings["model"]["vocabulary_size"] = section.model.vocabulary_size or VOCABULARY_SIZE
    for said in (settings["training"], settings["training"]["optimizer"]):
        for name in [name for name, unsaid in LATER.items() if name in said and said[name] == unsaid]:
            del said[name]
    validation = settings["training"].pop("validation")
    if validation is not None and validation["patience"] is not None:  # else it looks on
        del validation["max_seconds"]
        kept = section.training.checkpoints
        validation |= {"metric": kept.best_metric, "packages_best": kept.keep_best > 0}
        settings["training"]["validation"] = validation
    fingerprints = {}
    told = []
    for task in tasks_of(key, section):
        prefix = f"{task.name} " if task.name else ""
        if task.dataset is not None:
            fingerprints[f"{prefix}dataset"] = open_mixed(f"{task.key}.dataset", task.dataset).fingerprint
        loader = task.loader.model_dump(mode="json", exclude=OPERATIONAL["loader"])
        if task.loader.mixture is not None:
            datasets = task.loader.mixture.datasets
            loader["mixture"]["datasets"] = [each.split for each in datasets]
            for number, each in enumerate(datasets):
                place = f"{task.key}.loader.mixture.datasets.{number}.uri"
                fingerprints[f"{prefix}mixture {number}"] = open_mixed(place, each.uri).fingerprint
        objectives = task.objectives.model_dump(mode="json")
        told.append({"name": task.name, "weight": task.weight, "loader": loader, "objectives": objectives})
    settings |= {"tasks": told} if len(told) > 1 else {"loader": told[0]["loader"]}
    for side, encoder in encoders_of(section.model).items():
        if encoder.checkpoint is not None:
            settings["model"][side]["checkpoint"] = None
            directory = checkpoint_directory(f"{key}.model.{side}.checkpoint", encoder.checkpoint)
            files = sorted(path.name for path in directory.iterdir() if path.is_file())
            fingerprints[f"{side} checkpoint"] = fingerprint(str(directory), files)
    if isinstance(section, PretrainConfig) and section.start is not None:
        fingerprints["start"] = read_package(str(section.start.package)).digest
    if isinstance(section, DistillConfig):
        settings["teachers"] = [each.weight for each in section.teachers]
        for number, teacher in enumerate(section.teachers):
            assert teacher.package is not None, "registered ones have been looked up"
            fingerprints[f"teacher {number}"] = read_package(teacher.package).digest
    return settings, fingerprints


def encoders_of(model: ModelConfig) -> dict[str, ImageEncoderConfig | TextEncoderConfig]:
    """The encoders that a model has, by the names of their sections."""
    sides: dict[str, ImageEncoderConfig | TextEncoderConfig | None] = {"image": model.image, "text": model.text}
    return {side: each for side, each in sides.items() if each is not None}


def with_absolute_paths(section: Section) -> Section:
    """The section as workers can use it, whose working directory is another's."""
    model = section.model
    for side, encoder in encoders_of(model).items():
        if encoder.checkpoint is not None and not encoder.checkpoint.startswith(IN_PACKAGE):
            changed = encoder.model_copy(update={"checkpoint": _absolute(encoder.checkpoint)})
            model = model.model_copy(update={side: changed})
    changes: dict[str, Any] = {"loader": _with_absolute_paths(section.loader), "model": model}
    if isinstance(section, PretrainConfig):
        if section.start is not None:
            changes["start"] = section.start.model_copy(update={"package": _absolute(str(section.start.package))})
        changes["tasks"] = [
            each.model_copy(
                update={
                    "dataset": None if each.dataset is None else _absolute(each.dataset),
                    "loader": _with_absolute_paths(each.loader),
                }
            )
            for each in section.tasks
        ]
    if isinstance(section, DistillConfig):
        changes["teachers"] = [
            each.model_copy(update={"package": _absolute(str(each.package))}) for each in section.teachers
        ]
    return section.model_copy(update=changes)


def _with_absolute_paths(loader: LoaderConfig) -> LoaderConfig:
    if loader.mixture is not None:
        datasets = [each.model_copy(update={"uri": _absolute(each.uri)}) for each in loader.mixture.datasets]
        loader = loader.model_copy(update={"mixture": loader.mixture.model_copy(update={"datasets": datasets})})
    if loader.cache.directory is not None:
        cache = loader.cache.model_copy(update={"directory": _absolute(loader.cache.directory)})
        loader = loader.model_copy(update={"cache": cache})
    return loader


def _absolute(uri: str) -> str:
    path = local_path(uri)
    return uri if path is None else str(path.absolute())


def vocabulary_of_data(key: str, section: Section, dataset: str) -> Vocabulary:
    """The vocabulary of the dataset at a URI. Of a package that the model begins with the tokenizer is kept, and the
    classes where they are all that the data has. Raises as `learn_vocabulary`."""
    data = [
        Texts(
            f"{task.key}.loader",
            # Texts alone are read: no frames, no pictures.
            open_readers(task.loader.model_copy(update={"frames": 0}), open_dataset(task.dataset or dataset)),
            task.loader,
        )
        for task in tasks_of(key, section)
    ]
    learnt = learn_vocabulary(data, section.model.vocabulary_size or VOCABULARY_SIZE, tokenizer_of(key, section))
    if isinstance(section, PretrainConfig) and section.start is not None:
        _, known = read_vocabulary(read_package(str(section.start.package)))
        if set(learnt.classes) <= set(known):
            return replace(learnt, classes=known)
    return learnt


def tokenizer_of(key: str, section: Section) -> Tokenizer | None:
    """The tokenizer that a section's package or text checkpoint brings; None where it is to be trained on the data.
    `key` is the recipe's, for errors. Raises as `load_tokenizer`."""
    if isinstance(section, PretrainConfig) and section.start is not None:
        return read_tokenizer(read_vocabulary(read_package(str(section.start.package)))[0])
    checkpoint = section.model.text.checkpoint if section.model.text is not None else None
    if checkpoint is None:
        return None
    place = f"{key}.model.text.checkpoint"
    return load_tokenizer(checkpoint_directory(place, checkpoint), place)


def check_held_out(key: str, tasks: Sequence[Task], dataset: str, validation: ValidationConfig | None) -> None:
    """Raise MisuseError naming the key where a task's dataset, or the stage's own at a URI, lacks the split, or one of
    their mixtures trains on it."""
    if validation is None:
        return
    examined = {open_dataset(each.dataset or dataset).fingerprint for each in tasks}
    for task in tasks:
        for number, other in enumerate(task.loader.mixture.datasets if task.loader.mixture else ()):
            if other.split == validation.split and open_dataset(other.uri).fingerprint in examined:
                raise MisuseError(
                    f"{task.key}.loader.mixture.datasets.{number}.split: {validation.split} of {other.uri} is what "
                    f"{key}.training.validation examines; train on another"
                )
    for each in tasks:
        data = open_dataset(each.dataset or dataset)
        if validation.split not in data.splits:
            raise MisuseError(
                f"{key}.training.validation.split: {data.uri} has no split {validation.split!r}; there are "
                f"{', '.join(data.splits)}"
            )


def kept_vocabulary(uri: str, learn: Callable[[], Vocabulary]) -> Vocabulary:
    """The vocabulary of an earlier run of the stage where there is one: a restart goes through no data before it."""
    if exists(uri):
        kept = read_json(uri)
        return Vocabulary(kept["tokenizer_json"], tuple(kept["classes"]))
    learnt = learn()
    write_json(uri, {"tokenizer_json": learnt.tokenizer_json, "classes": learnt.classes})
    return learnt
