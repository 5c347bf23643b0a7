"""What is wrong with a training section, found before anything is made: its model is built without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.learning.objectives import ObjectivesConfig, check_objectives, check_trained
from mmflow.learning.outputs import MaskingTokens, masking_tokens
from mmflow.loading.opening import open_mixed, open_readers
from mmflow.loading.tokens import load_tokenizer, read_tokenizer
from mmflow.models.backbones import encoder_config
from mmflow.models.checkpoints import checkpoint_directory
from mmflow.models.config import VOCABULARY_SIZE, ModelConfig, TextEncoderConfig
from mmflow.models.lora import check_lora
from mmflow.models.model import Model, build, with_special_tokens
from mmflow.models.package import Package, check_start, fresh_parts, read_config, read_package, read_vocabulary
from mmflow.training.config import DistillConfig, PretrainConfig, Task, TrainingConfig, tasks_of
from mmflow.training.validation import validation_metrics


def check_training(key: str, section: PretrainConfig | DistillConfig) -> None:
    """Raise RecipeError naming the key where the model cannot be built, or does not give what its objectives read.

    What only the data can tell, such as the tokenizer's size and the number of classes, is taken to be as asked for.
    """
    config, tasks = section.model, tasks_of(key, section)
    for task in tasks:
        _check_task(key, task, config)
    _check_targets(tasks)
    start = section.start if isinstance(section, PretrainConfig) else None
    tokenizer = tokenizer_of(key, section) if isinstance(section, PretrainConfig) else None
    if isinstance(section, DistillConfig):
        _checkpoint(key, config.text)
    special = MaskingTokens(0, (), config.vocabulary_size or VOCABULARY_SIZE)
    if tokenizer is not None:
        special = masking_tokens(tokenizer)
        config = with_special_tokens(f"{key}.model", config, tokenizer)
    for task in tasks:
        check_objectives(f"{task.key}.objectives", task.objectives, config.gives, special)
    losses = section.losses.named if isinstance(section, DistillConfig) else {}
    objectives = [task.objectives for task in tasks]
    check_trained(key, config, objectives, [part for loss in losses.values() for part in loss.TRAINS])
    _check_best(key, section.training, tasks, config, sorted(losses))
    if section.training.micro_batch_size is not None:
        _check_micro_batches(key, section, objectives)
    encoders = config.encoders
    lora = section.lora if isinstance(section, PretrainConfig) else None
    if start is not None:
        model, fresh = _check_start(key, config, read_package(str(start.package)), special.vocabulary_size)
        if lora is not None:
            check_lora(f"{key}.lora", model, lora, fresh)
    elif any(encoder.checkpoint is not None for encoder in encoders.values()):
        # Its weights would be read, which takes long: all else is checked when the model is built.
        for side, encoder in encoders.items():
            encoder_config(f"{key}.model.{side}", encoder)
    else:
        with torch.device("meta"):
            model = build(f"{key}.model", config, special.vocabulary_size, seed=0, num_classes=2)
        if lora is not None:
            check_lora(f"{key}.lora", model, lora, fresh_parts(model, config))


def _check_task(key: str, task: Task, config: ModelConfig) -> None:
    """Raise RecipeError where a task's batches are not what its objectives and the model of section `key` read."""
    frames = task.loader.frames
    if frames and config.video is None:
        place = f"{task.key}.loader.frames"
        raise RecipeError(f"{place}: {frames}, but {key}.model.video is missing; name it, or read stills")
    if config.video is not None and frames != config.video.max_frames:
        # Evaluation shows as many as the model reads: more than were trained would be read at untrained positions.
        raise RecipeError(
            f"{task.key}.loader.frames: {frames}, and {key}.model.video.max_frames is {config.video.max_frames}; "
            "make them equal"
        )
    for name, objective in task.objectives.named.items():
        if setting := objective.missing_target(task.loader):
            place = f"{task.key}.objectives.{name}"
            raise RecipeError(f"{place}: the batches have no target; set {task.key}.loader.{setting}")
    if task.dataset is not None:
        open_readers(task.loader.model_copy(update={"mixture": None}), open_mixed(f"{task.key}.dataset", task.dataset))


def _check_targets(tasks: Sequence[Task]) -> None:
    """Raise RecipeError where tasks have targets of two kinds, which one list of classes cannot number."""
    kinds = {
        task.key: "answers" if task.loader.text == "questions" else f"classes of {task.loader.label}"
        for task in tasks
        if task.loader.text == "questions" or task.loader.label is not None
    }
    if len(set(kinds.values())) > 1:
        (first, one), (other, another) = next(
            pair for pair in combinations(kinds.items(), 2) if pair[0][1] != pair[1][1]
        )
        raise RecipeError(
            f"{other}.loader: its targets are {another}, those of {first} are {one}, and a model has one head for "
            "classes; leave one of the tasks out"
        )


def _check_start(
    key: str, config: ModelConfig, package: Package, vocabulary_size: int
) -> tuple[Model, tuple[str, ...]]:
    """The model that begins with a package, without weights, and what of it is fresh. Raises RecipeError where it
    cannot be built, or does not fit the package."""
    for side, encoder in config.encoders.items():
        if encoder.checkpoint is not None:
            raise RecipeError(
                f"{key}.model.{side}.checkpoint: its weights are those of {key}.start; leave one of the two out"
            )
    theirs = read_config(package).vocabulary_size
    if config.vocabulary_size != theirs:
        raise RecipeError(
            f"{key}.model.vocabulary_size: {config.vocabulary_size}, and the package of {key}.start brings its own "
            "tokenizer; leave it out"
        )
    with torch.device("meta"):
        model = build(f"{key}.model", config, vocabulary_size, seed=0, num_classes=2)
    return model, check_start(f"{key}.start", model, package)


def check_student(pretrain: PretrainConfig, distill: DistillConfig) -> None:
    """Raise RecipeError where the student's settings do not go with the tokenizer that it reads by, that of the teacher
    that `pretrain` trains."""
    model, taught = distill.model, pretrain.model
    # What a teacher with a checkpoint has is known by its tokenizer alone.
    has_own = taught.text is not None and taught.text.checkpoint is None
    theirs_is = (taught.vocabulary_size or VOCABULARY_SIZE) if has_own and pretrain.start is None else None
    if model.vocabulary_size not in (None, theirs_is):
        raise RecipeError(
            f"distill.model.vocabulary_size: {model.vocabulary_size}, and a student has its teacher's tokenizer; leave "
            "it out"
        )
    own = _checkpoint("distill", model.text)
    tokenizer = tokenizer_of("pretrain", pretrain)
    if tokenizer is not None:
        with_special_tokens("distill.model", model, tokenizer)
    # One that was saved without a tokenizer is known by the size of its vocabulary alone, when it is built.
    if own is not None and (
        tokenizer is None
        or ((own / "tokenizer.json").is_file() and load_tokenizer(own).get_vocab() != tokenizer.get_vocab())
    ):
        raise RecipeError(
            f"distill.model.text.checkpoint: {own} was trained with another tokenizer than the teacher's, by which a "
            "student reads; give text a type instead, or the teacher this checkpoint"
        )


def tokenizer_of(key: str, section: PretrainConfig | DistillConfig) -> Tokenizer | None:
    """The tokenizer of a section's package or text checkpoint; None if it is trained on the data. `key` is the
    recipe's, for errors. Raises as `load_tokenizer`."""
    if isinstance(section, PretrainConfig) and section.start is not None:
        return read_tokenizer(read_vocabulary(read_package(str(section.start.package)))[0])
    directory = _checkpoint(key, section.model.text)
    return None if directory is None else load_tokenizer(directory, f"{key}.model.text.checkpoint")


def _checkpoint(key: str, text: TextEncoderConfig | None) -> Path | None:
    """Where the checkpoint lies that a text encoder comes from; None for fresh weights, and without an encoder."""
    if text is None or text.checkpoint is None:
        return None
    return checkpoint_directory(f"{key}.model.text.checkpoint", text.checkpoint)


def _check_best(
    key: str, training: TrainingConfig, tasks: Sequence[Task], model: ModelConfig, losses: Sequence[str]
) -> None:
    """Raise RecipeError where checkpoints are chosen or a training is ended by what nothing writes, or validation is no
    other split than training."""
    metric, validation = training.checkpoints.best_metric, training.validation
    objectives = {task.name: list(task.objectives.named) for task in tasks}
    trained = ["loss", *losses]
    for of_task, own in objectives.items():
        trained += [f"{of_task}/{name}" for name in ("loss", *own)] if of_task else own
    held_out = [] if validation is None else validation_metrics(objectives, model.gives)
    if metric not in (*trained, *held_out):
        raise RecipeError(
            f"{key}.training.checkpoints.best_metric: this training writes no {metric}; take one of "
            f"{', '.join((*trained, *held_out))}"
        )
    if validation is None:
        return
    for task in tasks:
        if task.loader.split == validation.split:
            raise RecipeError(
                f"{key}.training.validation.split: {validation.split} is what {task.key}.loader trains on; name one "
                "that is held out"
            )
    if validation.patience is not None and metric not in held_out:
        raise RecipeError(
            f"{key}.training.validation.patience: it waits for a better {key}.training.checkpoints.best_metric, and "
            f"{metric} is of what is trained on; take one of {', '.join(held_out)}"
        )


def _check_micro_batches(
    key: str, section: PretrainConfig | DistillConfig, objectives: Sequence[ObjectivesConfig]
) -> None:
    """Raise RecipeError where something needs more of the whole batch than its embeddings."""
    named = [objective for task in objectives for objective in task.named.values()]
    reasons = [objective.WHOLE_BATCH for objective in named if objective.WHOLE_BATCH]
    if section.model.tight:
        reasons.append("video of kind tight scores every pair")
    if isinstance(section, DistillConfig):
        reasons.append("distillation losses compare with a teacher")
    if reasons:
        raise RecipeError(f"{key}.training.micro_batch_size: {reasons[0]} and needs the whole batch; leave it out")
