"""The tokens that a model counts on in every text: the one that opens it, the one that closes it, and padding."""

from __future__ import annotations

from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.loading.tokens import special_tokens
from mmflow.models.backbones import OWN_IDS, encoder_config
from mmflow.models.config import ModelConfig
from mmflow.models.generate import Marks


def marks_of(key: str, tokenizer: Tokenizer) -> Marks:
    """What a decoder's text begins, ends and is padded with. `key` is the recipe's, of the model, for errors.

    Raises RecipeError where the tokenizer does not put such a token at both ends of every text: a decoder that never
    saw one in training would not know how to begin, nor when to end.
    """
    special = special_tokens(tokenizer)
    ids = tokenizer.encode("a").ids
    if special.first is None or special.last is None or (ids[0], ids[-1]) != (special.first, special.last):
        raise RecipeError(
            f"{key}.decoder: the tokenizer puts no token before and after each text, with which a decoder begins and "
            "ends; use one that does"
        )
    return Marks(special.first, special.last, special.pad)


def with_marks(key: str, config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The settings of a model that reads with this tokenizer: a fresh text encoder is told the ids of padding and of
    the closing token, where the recipe does not and they are not those of our own tokenizer.

    A student has its teacher's tokenizer, which may have come with a checkpoint: RoBERTa tells places by the id of
    padding, CLIP pools at that of the closing token. Raises RecipeError as `marks_of` where there is a decoder.
    """
    if config.decoder is not None:
        marks_of(key, tokenizer)
    text = config.text
    if text is None or text.checkpoint is not None:
        return config
    special = special_tokens(tokenizer)
    ids = {"pad_token_id": special.pad, "eos_token_id": special.last}
    known = encoder_config(f"{key}.text", text).to_dict()
    told = {name: mark for name, mark in ids.items() if name in known and mark != OWN_IDS[name]}
    if not told.keys() - text.options.keys():
        return config
    return config.model_copy(update={"text": text.model_copy(update={"options": {**told, **text.options}})})
