"""What is wrong with a training section is named by its key before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from mmflow.errors import RecipeError
from mmflow.loading.tokens import train_tokenizer
from mmflow.training.check import check_training
from mmflow.training.config import PretrainConfig
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


def test_a_part_that_nothing_trains_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^pretrain\.model\.heads: masked_language: no objective trains it"):
        check_training("pretrain", section(heads=["masked_language"]))
