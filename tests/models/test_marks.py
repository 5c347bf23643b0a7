"""A decoder is not trained with a tokenizer that opens and closes no text, and a fresh text encoder is told the marks
of the tokenizer that it reads with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmflow.core.errors import RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.generate import decoder_tokens
from mmflow.models.model import build, with_special_tokens
from tests.models.backbones import TEXT

WORDS = ["red", "green", "apple", "pear"]
DECODER = {"width": 8, "layers": 1, "heads": 2}


def of_roberta_kind(opens: bool = True) -> Tokenizer:
    """Marks by other names and ids than ours: padding is 1, the closing token 2."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if opens else "$A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return made


def reading(config: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | changes)


@pytest.mark.parametrize(
    "tokenizer",
    [of_roberta_kind(opens=False), Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))],
)
def test_a_tokenizer_that_opens_or_closes_no_text_is_refused_for_a_decoder(
    tiny_config: ModelConfig, tokenizer: Tokenizer
) -> None:
    writes = reading(tiny_config, decoder=DECODER)
    with pytest.raises(RecipeError, match=r"^pretrain\.model\.decoder: the tokenizer puts no token before and after"):
        with_special_tokens("pretrain.model", writes, tokenizer)
    with_special_tokens("pretrain.model", tiny_config, tokenizer)


def test_marks_are_the_tokenizer_s_own(tiny_tokenizer: Tokenizer) -> None:
    assert decoder_tokens("model", tiny_tokenizer) == (2, 3, 0)
    assert decoder_tokens("model", of_roberta_kind()) == (0, 2, 1)


def test_our_own_tokenizer_changes_no_settings(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    assert with_special_tokens("pretrain.model", tiny_config, tiny_tokenizer) is tiny_config


def test_a_fresh_encoder_reads_by_another_tokenizer_s_marks(tiny_config: ModelConfig) -> None:
    """RoBERTa gives padding no place: by our id of padding it would give the opening token none."""
    tokenizer = of_roberta_kind()
    text = {"type": "roberta", "options": TEXT["roberta"], "pooling": "eos"}
    fresh = reading(tiny_config, text=text)
    told = with_special_tokens("distill.model", fresh, tokenizer)
    assert told.text is not None
    assert told.text.options == TEXT["roberta"] | {"pad_token_id": 1, "eos_token_id": 2}
    encoder = build("distill.model", told, tokenizer.get_vocab_size(), seed=0).eval().text
    assert encoder is not None
    ids = torch.tensor([tokenizer.encode("red apple").ids])
    read = encoder(ids)
    torch.testing.assert_close(read.pooled_BW, read.sequence_BTW[:, 3])
    places = encoder.backbone.embeddings.create_position_ids_from_input_ids(ids, encoder.padding)
    assert places.tolist() == [[2, 3, 4, 5]]


def test_what_the_recipe_says_of_marks_stays(tiny_config: ModelConfig) -> None:
    text = {"type": "roberta", "options": TEXT["roberta"] | {"pad_token_id": 3, "eos_token_id": 4}}
    fresh = reading(tiny_config, text=text)
    assert with_special_tokens("distill.model", fresh, of_roberta_kind()) is fresh
