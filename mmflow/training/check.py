"""What can be wrong with a training, found before it runs: its settings, without loading weights, and the gradient that
its workers compute, with a small model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig, check_objectives, check_trained
from mmflow.learning.outputs import MaskingTokens, masking_tokens
from mmflow.learning.rows import ALONE, all_ranks
from mmflow.loading.batches import Batch
from mmflow.loading.opening import open_mixed, open_readers
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import load_tokenizer, read_tokenizer
from mmflow.models.backbones import encoder_config
from mmflow.models.config import VOCABULARY_SIZE, ModelConfig, TextEncoderConfig
from mmflow.models.lora import check_lora
from mmflow.models.model import build, with_special_tokens
from mmflow.models.package import Package, check_start, fresh_parts, read_config, read_package, read_vocabulary
from mmflow.models.pretrained import checkpoint_directory
from mmflow.training.config import DistillConfig, PretrainConfig, Task, TrainingConfig, tasks_of
from mmflow.training.engine import descend, engine_settings, prepare_deepspeed, rows_of, whole_state
from mmflow.training.validation import validation_metrics

TOLERANCE = 1e-4  # of the largest gradient; a missing factor or row is an error of a tenth and more
RATE = 1024.0  # of plain gradient descent: a weight moves far enough to read its gradient to six digits
ROWS, TOKENS, ANSWER_TOKENS, CLASSES, VOCABULARY, PIXELS = 4, 10, 5, 3, 64, 16
SPECIAL = MaskingTokens(mask=4, ids=(0, 1, 2, 3, 4), vocabulary_size=VOCABULARY)

_TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Section = PretrainConfig | DistillConfig


def check_training(key: str, section: Section) -> None:
    """Raise RecipeError naming the key where the model cannot be built, or does not give what its objectives read.

    What only the data can tell, such as the tokenizer's size and the number of classes, is assumed to be as requested.
    """
    config, tasks, training = section.model, tasks_of(key, section), section.training
    for task in tasks:
        _check_task(key, task, config)
    _check_targets(tasks)
    special = MaskingTokens(0, (), config.vocabulary_size or VOCABULARY_SIZE)
    if isinstance(section, DistillConfig):
        _checkpoint(key, config.text)
    elif (tokenizer := tokenizer_of(key, section)) is not None:
        special = masking_tokens(tokenizer)
        config = with_special_tokens(f"{key}.model", config, tokenizer)
    for task in tasks:
        check_objectives(f"{task.key}.objectives", task.objectives, config.gives, special)
    losses = section.losses.named if isinstance(section, DistillConfig) else {}
    objectives = [task.objectives for task in tasks]
    check_trained(key, config, objectives, [part for loss in losses.values() for part in loss.TRAINS])
    _check_validation(key, training, tasks)
    _check_best(key, training, tasks, config, sorted(losses))
    if training.micro_batch_size is not None:
        _check_micro_batches(key, section, objectives)
    start, lora = (section.start, section.lora) if isinstance(section, PretrainConfig) else (None, None)
    if start is None and any(encoder.checkpoint is not None for encoder in config.encoders.values()):
        # Building would read its weights, which takes long; the rest is checked when the model is built.
        for side, encoder in config.encoders.items():
            encoder_config(f"{key}.model.{side}", encoder)
        return
    package = None if start is None else read_package(str(start.package))
    if package is not None:
        _check_start(key, config, package)
    with torch.device("meta"):
        model = build(f"{key}.model", config, special.vocabulary_size, seed=0, num_classes=2)
    fresh = fresh_parts(model, config) if package is None else check_start(f"{key}.start", model, package)
    if lora is not None:
        check_lora(f"{key}.lora", model, lora, fresh)


def _check_task(key: str, task: Task, config: ModelConfig) -> None:
    """Check that a task's batches fit its objectives and the model of section `key`."""
    frames = task.loader.frames
    if frames and config.video is None:
        raise RecipeError(
            f"{task.key}.loader.frames: {frames}, but {key}.model.video is missing; name it, or set frames to 0"
        )
    if config.video is not None and frames != config.video.max_frames:
        # Evaluation shows as many as the model reads: more than were trained would be read at untrained positions.
        raise RecipeError(
            f"{task.key}.loader.frames: {frames}, and {key}.model.video.max_frames is {config.video.max_frames}; "
            "make them equal"
        )
    for name, objective in task.objectives.named.items():
        if setting := objective.missing_target(task.loader):
            raise RecipeError(
                f"{task.key}.objectives.{name}: the batches have no target; set {task.key}.loader.{setting}"
            )
    if task.dataset is not None:
        open_readers(task.loader.model_copy(update={"mixture": None}), open_mixed(f"{task.key}.dataset", task.dataset))


def _check_targets(tasks: Sequence[Task]) -> None:
    """Check that all tasks have the same kind of targets: one list of classes numbers them."""
    kinds = {
        task.key: "answers" if task.loader.text == "questions" else f"classes of {task.loader.label}"
        for task in tasks
        if task.loader.text == "questions" or task.loader.label is not None
    }
    for (first, first_kind), (second, second_kind) in combinations(kinds.items(), 2):
        if first_kind != second_kind:
            raise RecipeError(
                f"{second}.loader: its targets are {second_kind}, and those of {first} are {first_kind}, but a model "
                "has one head for classes; leave one of the tasks out"
            )


def _check_start(key: str, config: ModelConfig, package: Package) -> None:
    """Check that a model that starts from a package takes weights and tokenizer only from there."""
    for side, encoder in config.encoders.items():
        if encoder.checkpoint is not None:
            raise RecipeError(
                f"{key}.model.{side}.checkpoint: {key}.start brings the weights; leave one of the two out"
            )
    if config.vocabulary_size != read_config(package).vocabulary_size:
        raise RecipeError(
            f"{key}.model.vocabulary_size: {config.vocabulary_size}, but the package of {key}.start brings its own "
            "tokenizer; leave it out"
        )


def check_student(pretrain: PretrainConfig, distill: DistillConfig) -> None:
    """Raise RecipeError where the student's settings do not fit its tokenizer, which is the teacher's."""
    student, teacher = distill.model, pretrain.model
    # The size of a checkpoint's or package's vocabulary is known only from its tokenizer.
    is_trained = teacher.text is not None and teacher.text.checkpoint is None and pretrain.start is None
    if student.vocabulary_size not in (None, (teacher.vocabulary_size or VOCABULARY_SIZE) if is_trained else None):
        raise RecipeError(
            f"distill.model.vocabulary_size: {student.vocabulary_size}, but a student has its teacher's tokenizer; "
            "leave it out"
        )
    own = _checkpoint("distill", student.text)
    tokenizer = tokenizer_of("pretrain", pretrain)
    if tokenizer is not None:
        with_special_tokens("distill.model", student, tokenizer)
    # A checkpoint without a tokenizer is checked by the size of its vocabulary, when the model is built.
    if own is not None and (
        tokenizer is None
        or ((own / "tokenizer.json").is_file() and load_tokenizer(own).get_vocab() != tokenizer.get_vocab())
    ):
        raise RecipeError(
            f"distill.model.text.checkpoint: {own} was trained with another tokenizer than the teacher's, which the "
            "student uses; give text a type instead, or the teacher this checkpoint"
        )


def tokenizer_of(key: str, section: Section) -> Tokenizer | None:
    """The tokenizer of a section's package or text checkpoint; None if it is trained on the data. `key` is the
    recipe's, for errors. Raises as `load_tokenizer`."""
    if isinstance(section, PretrainConfig) and section.start is not None:
        return read_tokenizer(read_vocabulary(read_package(str(section.start.package)))[0])
    directory = _checkpoint(key, section.model.text)
    return None if directory is None else load_tokenizer(directory, f"{key}.model.text.checkpoint")


def _checkpoint(key: str, text: TextEncoderConfig | None) -> Path | None:
    """The directory of a text encoder's checkpoint; None for fresh weights, and without an encoder."""
    if text is None or text.checkpoint is None:
        return None
    return checkpoint_directory(f"{key}.model.text.checkpoint", text.checkpoint)


def _check_validation(key: str, training: TrainingConfig, tasks: Sequence[Task]) -> None:
    """Check that validation uses another split than training."""
    held_out = None if training.validation is None else training.validation.split
    for task in tasks:
        if task.loader.split == held_out:
            raise RecipeError(
                f"{key}.training.validation.split: {task.loader.split} is what {task.key}.loader trains on; name a "
                "held-out split"
            )


def _check_best(
    key: str, training: TrainingConfig, tasks: Sequence[Task], model: ModelConfig, losses: Collection[str]
) -> None:
    """Check that the training writes the metric that chooses checkpoints, or that ends it."""
    metric, validation = training.checkpoints.best_metric, training.validation
    objectives = {task.name: list(task.objectives.named) for task in tasks}
    trained = ["loss", *losses]
    for task_name, names in objectives.items():
        trained += [f"{task_name}/{name}" for name in ("loss", *names)] if task_name else names
    validated = [] if validation is None else validation_metrics(objectives, model.gives)
    if metric not in (*trained, *validated):
        raise RecipeError(
            f"{key}.training.checkpoints.best_metric: this training writes no {metric}; use one of "
            f"{', '.join((*trained, *validated))}"
        )
    if validation is not None and validation.patience is not None and metric not in validated:
        raise RecipeError(
            f"{key}.training.validation.patience: it waits for a better {key}.training.checkpoints.best_metric, but "
            f"{metric} is a training metric; use one of {', '.join(validated)}"
        )


def _check_micro_batches(key: str, section: Section, objectives: Sequence[ObjectivesConfig]) -> None:
    """Raise RecipeError where something needs more of the whole batch than its embeddings."""
    named = [objective for task in objectives for objective in task.named.values()]
    reasons = [objective.WHOLE_BATCH for objective in named if objective.WHOLE_BATCH]
    if section.model.tight:
        reasons.append("video of kind tight scores every pair")
    if isinstance(section, DistillConfig):
        reasons.append("distillation losses compare with a teacher")
    if reasons:
        raise RecipeError(f"{key}.training.micro_batch_size: {reasons[0]} and needs the whole batch; leave it out")


# --- the gradient ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientCheck:
    """What is checked, as plain data that travels to other machines."""

    model: ModelConfig  # the small one
    objectives: ObjectivesConfig
    training: TrainingConfig


@dataclass(frozen=True)
class Compared:
    """One objective's gradient over all weights."""

    objective: str
    error: float  # the largest difference
    largest: float  # entry of one process's gradient

    @property
    def equal(self) -> bool:
        """Whether the gradients are equal up to rounding, and not zero."""
        return self.largest > 0 and self.error <= TOLERANCE * self.largest


def small_check(model: ModelConfig, objectives: ObjectivesConfig, training: TrainingConfig) -> GradientCheck:
    """A check of a training section, with the smallest model that has the same parts."""
    changes: dict[str, Any] = {"num_workers": training.most_workers, "precision": "fp32", "max_restarts": 0}
    if training.micro_batch_size is not None:
        changes["micro_batch_size"] = ROWS // 2
    return GradientCheck(_small_model(model), objectives, training.model_copy(update=changes))


def _small_model(model: ModelConfig) -> ModelConfig:
    """Stills instead of clips: an image encoder makes one vector of a clip's frames before any exchange."""
    small: dict[str, Any] = {
        "image": {"type": "vit", "options": {**_TRANSFORMER, **_NO_DROPOUT, "patch_size": PIXELS // 2}},
        "embedding_width": None if model.embedding_width is None else 8,
        "image_pixels": PIXELS,
        "max_tokens": TOKENS,
        "vocabulary_size": VOCABULARY,
        "temperature": model.temperature,
        "bias": model.bias,
        "heads": model.heads,
    }
    if model.text is not None:
        small["text"] = {"type": "bert", "options": {**_TRANSFORMER, **_NO_DROPOUT, "max_position_embeddings": TOKENS}}
    if model.fusion is not None:
        attention = {"layers": 1, "heads": 2} if model.fusion.layers is not None else {}
        small["fusion"] = {"kind": model.fusion.kind, "width": 16, "dropout": 0.0, **attention}
    if model.decoder is not None:
        small["decoder"] = {"memory": model.decoder.memory, "width": 16, "layers": 1, "heads": 2, "dropout": 0.0}
    return ModelConfig.model_validate(small)


def compare_gradients(check: GradientCheck) -> list[Compared]:
    """Compare each objective on its own. Collective; rank 0 gets the result, the others an empty list."""
    prepare_deepspeed()
    return [compared for name in check.objectives.named if (compared := _compare(check, name)) is not None]


def _compare(check: GradientCheck, name: str) -> Compared | None:
    import deepspeed

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = build("model", check.model, VOCABULARY, seed=0, num_classes=CLASSES)
    learner = Learner(model, check.model, [_single(check.objectives, name)], SPECIAL, seed=0, ranks=all_ranks())
    one_process = copy.deepcopy(learner)
    one_process.ranks = ALONE
    engine, *_ = deepspeed.initialize(
        model=learner,
        optimizer=torch.optim.SGD(learner.parameters(), lr=RATE),
        config=engine_settings(check.training, ROWS, clipped=False),
        dist_init_required=False,
    )
    batch = _random_batch(num_ranks * ROWS).map_tensors(lambda tensor: tensor.to(engine.device))
    before = whole_state(model)
    descend(engine, rows_of(batch, slice(rank * ROWS, (rank + 1) * ROWS)), 1)
    engine.step()
    after = whole_state(model)
    if rank > 0:
        return None
    one_process.to(engine.device)
    one_process(batch, 1)[0].backward()
    errors, sizes = [], []
    for key, parameter in one_process.model.named_parameters():
        expected = torch.zeros_like(before[key]) if parameter.grad is None else parameter.grad.cpu()
        errors.append(((before[key] - after[key]) / RATE - expected).abs().max())
        sizes.append(expected.abs().max())
    return Compared(name, float(torch.stack(errors).max()), float(torch.stack(sizes).max()))


def _single(objectives: ObjectivesConfig, name: str) -> ObjectivesConfig:
    """One objective with weight 1. Matching draws partners from all rows: from a rank's own it would draw others."""
    objective = objectives.named[name].over_all_ranks().model_copy(update={"weight": 1.0})
    return ObjectivesConfig.model_validate({name: objective})


def _random_batch(rows: int) -> Batch:
    """A global batch with texts of different lengths; the last row is padding."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, TOKENS + 1, (rows, 1), generator=random)
    answer_lengths = torch.randint(2, ANSWER_TOKENS + 1, (rows, 1), generator=random)
    return Batch(
        keys=tuple(f"sample {number}" for number in range(rows)),
        pixels=torch.randint(0, 256, (rows, 3, PIXELS, PIXELS), generator=random, dtype=torch.uint8),
        token_ids=torch.randint(5, VOCABULARY, (rows, TOKENS), generator=random),
        token_mask=(torch.arange(TOKENS) < lengths).long(),
        real=torch.arange(rows) < rows - 1,
        targets={
            "label": torch.randint(-1, CLASSES, (rows,), generator=random),
            "answer": torch.randint(-1, CLASSES, (rows,), generator=random),
            "answer_scores": torch.rand(rows, CLASSES, generator=random),
            "answer_ids": torch.randint(5, VOCABULARY, (rows, ANSWER_TOKENS), generator=random),
            "answer_mask": (torch.arange(ANSWER_TOKENS) < answer_lengths).long(),
        },
        state=LoaderState(),
    )
