"""What tells one training from another before it begins, and what it learns of its data first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmflow.artifacts import exists, local_path, read_json, write_json
from mmflow.ingest.listing import fingerprint
from mmflow.loading.opening import open_mixed, open_readers
from mmflow.loading.vocabulary import Vocabulary, learn_vocabulary
from mmflow.models.checkpoints import IN_PACKAGE, checkpoint_directory
from mmflow.models.config import VOCABULARY_SIZE, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from mmflow.models.package import read_package
from mmflow.shards.dataset import open_dataset
from mmflow.training.config import DistillConfig, PretrainConfig

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
    settings["model"]["vocabulary_size"] = section.model.vocabulary_size or VOCABULARY_SIZE
    for said in (settings["training"], settings["training"]["optimizer"]):
        for name in [name for name, unsaid in LATER.items() if name in said and said[name] == unsaid]:
            del said[name]
    fingerprints = {}
    if section.loader.mixture is not None:
        datasets = section.loader.mixture.datasets
        settings["loader"]["mixture"]["datasets"] = [each.split for each in datasets]
        for number, each in enumerate(datasets):
            place = f"{key}.loader.mixture.datasets.{number}.uri"
            fingerprints[f"mixture {number}"] = open_mixed(place, each.uri).fingerprint
    for side, encoder in encoders_of(section.model).items():
        if encoder.checkpoint is not None:
            settings["model"][side]["checkpoint"] = None
            directory = checkpoint_directory(f"{key}.model.{side}.checkpoint", encoder.checkpoint)
            files = sorted(path.name for path in directory.iterdir() if path.is_file())
            fingerprints[f"{side} checkpoint"] = fingerprint(str(directory), files)
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
    loader, model = section.loader, section.model
    if loader.mixture is not None:
        datasets = [each.model_copy(update={"uri": _absolute(each.uri)}) for each in loader.mixture.datasets]
        loader = loader.model_copy(update={"mixture": loader.mixture.model_copy(update={"datasets": datasets})})
    if loader.cache.directory is not None:
        cache = loader.cache.model_copy(update={"directory": _absolute(loader.cache.directory)})
        loader = loader.model_copy(update={"cache": cache})
    for side, encoder in encoders_of(model).items():
        if encoder.checkpoint is not None and not encoder.checkpoint.startswith(IN_PACKAGE):
            changed = encoder.model_copy(update={"checkpoint": _absolute(encoder.checkpoint)})
            model = model.model_copy(update={side: changed})
    changes: dict[str, Any] = {"loader": loader, "model": model}
    if isinstance(section, DistillConfig):
        changes["teachers"] = [
            each.model_copy(update={"package": _absolute(str(each.package))}) for each in section.teachers
        ]
    return section.model_copy(update=changes)


def _absolute(uri: str) -> str:
    path = local_path(uri)
    return uri if path is None else str(path.absolute())


def vocabulary_of_data(key: str, section: Section, dataset: str) -> Vocabulary:
    """The vocabulary of the dataset at a URI. Raises as `learn_vocabulary`."""
    # Texts alone are read: no frames, no pictures.
    readers = open_readers(section.loader.model_copy(update={"frames": 0}), open_dataset(dataset))
    text = section.model.text
    checkpoint = text.checkpoint if text else None
    directory = checkpoint_directory(f"{key}.model.text.checkpoint", checkpoint) if checkpoint else None
    size = section.model.vocabulary_size or VOCABULARY_SIZE
    return learn_vocabulary(readers, section.loader, size, directory, key)


def kept_vocabulary(uri: str, learn: Callable[[], Vocabulary]) -> Vocabulary:
    """The vocabulary of an earlier run of the stage where there is one: a restart goes through no data before it."""
    if exists(uri):
        kept = read_json(uri)
        return Vocabulary(kept["tokenizer_json"], tuple(kept["classes"]))
    learnt = learn()
    write_json(uri, {"tokenizer_json": learnt.tokenizer_json, "classes": learnt.classes})
    return learnt
