"""What is wrong with a training section, found before anything is made: its model is built without its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from mmflow.errors import RecipeError
from mmflow.loading.tokens import load_tokenizer
from mmflow.models.backbones import encoder_config
from mmflow.models.checkpoints import checkpoint_directory
from mmflow.models.config import VOCABULARY_SIZE, TextEncoderConfig
from mmflow.models.marks import with_marks
from mmflow.models.model import build
from mmflow.objectives.objectives import check
from mmflow.objectives.outputs import MaskingTokens, masking_tokens
from mmflow.objectives.parts import check_trained
from mmflow.training.config import DistillConfig, PretrainConfig
from mmflow.training.stage import encoders_of

OF_EMBEDDINGS = {"soft_labels", "similarities", "features", "interactive", "ranking"}  # lessons that train them


def check_training(key: str, section: PretrainConfig | DistillConfig) -> None:
    """Raise RecipeError naming the key where the model cannot be built, or does not give what its objectives read.

    What only the data can tell, such as the tokenizer's size and the number of classes, is taken to be as asked for.
    """
    config = section.model
    frames = section.loader.frames
    if frames and config.video is None:
        raise RecipeError(f"{key}.loader.frames: {frames}, but {key}.model.video is missing; name it, or read stills")
    if config.video is not None and frames != config.video.max_frames:
        # Evaluation shows as many as the model reads: more than were trained would be read at untrained positions.
        raise RecipeError(
            f"{key}.loader.frames: {frames}, and {key}.model.video.max_frames is {config.video.max_frames}; "
            "make them equal"
        )
    wanted = {
        "answering": ("text", "questions", section.loader.text == "questions"),
        "classification": ("label", "the name of a class in the samples' metadata", section.loader.label is not None),
    }
    for name, (option, value, is_set) in wanted.items():
        if name in section.objectives.named and not is_set:
            raise RecipeError(f"{key}.objectives.{name}: its targets are nowhere; set {key}.loader.{option} to {value}")
    directory = _checkpoint(key, config.text)
    special = MaskingTokens(0, (), config.vocabulary_size or VOCABULARY_SIZE)
    if directory is not None and isinstance(section, PretrainConfig):
        tokenizer = load_tokenizer(directory, f"{key}.model.text.checkpoint")
        special = masking_tokens(tokenizer)
        with_marks(f"{key}.model", config, tokenizer)
    check(f"{key}.objectives", section.objectives, config.gives, special)
    lessons = set(section.lessons.named) if isinstance(section, DistillConfig) else set[str]()
    check_trained(key, config, section.objectives, {"embedding_width"} if lessons & OF_EMBEDDINGS else ())
    if section.training.micro_batch_size is not None:
        _check_micro_batches(key, section)
    encoders = encoders_of(config)
    if any(encoder.checkpoint is not None for encoder in encoders.values()):
        # Its weights would be read, which takes long: all else is checked when the model is built.
        for side, encoder in encoders.items():
            encoder_config(f"{key}.model.{side}", encoder)
    else:
        with torch.device("meta"):
            build(f"{key}.model", config, special.vocabulary_size, seed=0, num_classes=2)


def check_student(pretrain: PretrainConfig, distill: DistillConfig) -> None:
    """Raise RecipeError where the student's settings do not go with the tokenizer that it reads by, that of the teacher
    that `pretrain` trains."""
    model, taught = distill.model, pretrain.model
    # What a teacher with a checkpoint has is known by its tokenizer alone.
    has_own = taught.text is not None and taught.text.checkpoint is None
    theirs_is = (taught.vocabulary_size or VOCABULARY_SIZE) if has_own else None
    if model.vocabulary_size not in (None, theirs_is):
        raise RecipeError(
            f"distill.model.vocabulary_size: {model.vocabulary_size}, and a student has its teacher's tokenizer; leave "
            "it out"
        )
    theirs, own = _checkpoint("pretrain", taught.text), _checkpoint("distill", model.text)
    tokenizer = None if theirs is None else load_tokenizer(theirs, "pretrain.model.text.checkpoint")
    if tokenizer is not None:
        with_marks("distill.model", model, tokenizer)
    # One that was saved without a tokenizer is known by the size of its vocabulary alone, when it is built.
    if own is not None and (
        tokenizer is None
        or ((own / "tokenizer.json").is_file() and load_tokenizer(own).get_vocab() != tokenizer.get_vocab())
    ):
        raise RecipeError(
            f"distill.model.text.checkpoint: {own} was trained with another tokenizer than the teacher's, by which a "
            "student reads; give text a type instead, or the teacher this checkpoint"
        )


def _checkpoint(key: str, text: TextEncoderConfig | None) -> Path | None:
    """Where the checkpoint lies that a text encoder comes from; None for fresh weights, and without an encoder."""
    if text is None or text.checkpoint is None:
        return None
    return checkpoint_directory(f"{key}.model.text.checkpoint", text.checkpoint)


def _check_micro_batches(key: str, section: PretrainConfig | DistillConfig) -> None:
    """Raise RecipeError where something reads the whole batch that is more than its embeddings."""
    reads = "matching, which fuses each picture with another's caption," if section.objectives.matching else None
    if section.model.tight:
        reads = "video of kind tight, which scores every pair,"
    if isinstance(section, DistillConfig):
        reads = "lessons, which compare with a teacher,"
    if reads is not None:
        raise RecipeError(f"{key}.training.micro_batch_size: {reads} must see the whole batch at once; leave it out")
