"""What is wrong with a training section is named by its key before anything is made."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from mmflow.core.errors import RecipeError
from mmflow.loading.tokens import train_tokenizer
from mmflow.training.check import check_student, check_training
from mmflow.training.config import DistillConfig, PretrainConfig
from tests.tiny import SMALLEST_MODEL

DECODER = {"width": 8, "layers": 1, "heads": 2}


def bert(directory: Path, tokenizer: Tokenizer) -> str:
    """A checkpoint as far as the check reads it: its weights are read when the model is built."""
    directory.mkdir()
    fields = SMALLEST_MODEL["text"]["options"] | {"model_type": "bert", "vocab_size": tokenizer.get_vocab_size()}
    (directory / "config.json").write_text(json.dumps(fields))
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def section(**model: Any) -> PretrainConfig:
    objectives: dict[str, Any] = {"contrastive": {}} | ({"captioning": {}} if "decoder" in model else {})
    return PretrainConfig.model_validate({"model": SMALLEST_MODEL | model, "objectives": objectives})


def test_a_decoder_wants_a_checkpoint_whose_tokenizer_opens_and_closes_texts(tmp_path: Path) -> None:
    bare = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}, unk_token="[UNK]"))
    changes = {"vocabulary_size": None, "text": {"checkpoint": bert(tmp_path / "bare", bare)}}
    check_training("pretrain", section(**changes))
    with pytest.raises(RecipeError, match=r"^pretrain\.model\.decoder: the tokenizer puts no token before and after"):
        check_training("pretrain", section(**changes, decoder=DECODER))
    changes["text"] = {"checkpoint": bert(tmp_path / "whole", train_tokenizer(["red apple"], 64))}
    check_training("pretrain", section(**changes, decoder=DECODER))


def test_what_a_checkpoint_s_model_or_tokenizer_does_not_give_is_named(tmp_path: Path) -> None:
    hides_none = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]"))
    text = {"checkpoint": bert(tmp_path / "bert", hides_none)}
    fields: dict[str, Any] = {"model": SMALLEST_MODEL | {"vocabulary_size": None, "text": text}}
    for objectives, message in (
        ({"matching": {}}, r"matching: needs fused; give the model a fusion"),
        ({"masked_language": {}}, r"masked_language: needs a mask token; use a tokenizer with"),
    ):
        fields["model"]["heads"] = ["masked_language"]
        fields["objectives"] = {"contrastive": {}} | objectives
        with pytest.raises(RecipeError, match=rf"^pretrain\.objectives\.{message}"):
            check_training("pretrain", PretrainConfig.model_validate(fields))


def test_a_part_that_nothing_trains_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^pretrain\.model\.heads: masked_language: no objective trains it"):
        check_training("pretrain", section(heads=["masked_language"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"training": {"micro_batch_size": 4}}, r"training\.micro_batch_size: video of kind tight scores every"),
        ({"objectives": {"sigmoid": {}}}, r"objectives\.sigmoid: needs embeddings; .* no video of kind tight"),
        ({"loader": {"frames": 3}}, r"loader\.frames: 3, and pretrain\.model\.video\.max_frames is 2; make them equal"),
    ],
)
def test_what_reads_no_scores_of_pairs_is_named(changes: dict[str, Any], message: str | None) -> None:
    video = {"kind": "tight", "max_frames": 2, "layers": 1, "heads": 2}
    fields = {"model": SMALLEST_MODEL | {"video": video}, "loader": {"frames": 2}} | changes
    refused = pytest.raises(RecipeError, match=f"^pretrain\\.{message}") if message else contextlib.nullcontext()
    with refused:
        check_training("pretrain", PretrainConfig.model_validate(fields))


def test_losses_train_the_space_that_they_compare_in() -> None:
    fields = {"model": SMALLEST_MODEL | {"heads": ["masked_language"]}, "objectives": {"masked_language": {}}}
    check_training("distill", DistillConfig.model_validate(fields))
    fields["losses"] = {"hidden": {"sides": ["text"]}}
    with pytest.raises(
        RecipeError, match=r"^distill\.model\.embedding_width: no objective trains it; name contrastive"
    ):
        check_training("distill", DistillConfig.model_validate(fields))


def student(**model: Any) -> DistillConfig:
    return DistillConfig.model_validate({"model": SMALLEST_MODEL | {"vocabulary_size": None} | model})


def test_a_student_reads_by_its_teacher_s_tokenizer(tmp_path: Path) -> None:
    words, others = (train_tokenizer([text], 64) for text in ("red apple", "green pear"))
    theirs = {"checkpoint": bert(tmp_path / "theirs", words)}
    taught = section(vocabulary_size=None, text=theirs)
    for model in ({}, {"text": theirs}, {"text": {"checkpoint": bert(tmp_path / "same", words)}}):
        check_student(taught, student(**model))
    other = {"checkpoint": bert(tmp_path / "other", others)}
    for teacher in (taught, section()):
        with pytest.raises(RecipeError, match=r"^distill\.model\.text\.checkpoint: .*/other was trained with another"):
            check_student(teacher, student(text=other))
    check_student(section(), student(vocabulary_size=64))
    with pytest.raises(RecipeError, match=r"^distill\.model\.vocabulary_size: 70, and a student has its teacher's"):
        check_student(section(), student(vocabulary_size=70))


def test_a_student_s_decoder_wants_a_teacher_whose_tokenizer_opens_texts(tmp_path: Path) -> None:
    bare = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}, unk_token="[UNK]"))
    taught = section(vocabulary_size=None, text={"checkpoint": bert(tmp_path / "bare", bare)})
    check_student(taught, student())
    with pytest.raises(RecipeError, match=r"^distill\.model\.decoder: the tokenizer puts no token before and after"):
        check_student(taught, student(decoder=DECODER))
