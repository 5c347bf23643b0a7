"""Text that a model's decoder writes: a caption of a picture, or the answer to a question about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mmflow.core.config import Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mmflow.inference.predict import Predictor
    from mmflow.models.encoders import Encoded

_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")


class WritingConfig(Config):
    """How a decoder's text is searched for."""

    search: Literal["greedy", "beam", "nucleus"] = "beam"
    """The likeliest token at each step; the likeliest text among several; or tokens drawn from the likeliest."""
    beams: int = Field(4, ge=1)
    """Texts that a beam search follows at once."""
    length_penalty: float = Field(1.0, ge=0)
    """A beam's log-probability is divided by its length to this power: above 0 favours longer text."""
    nucleus: float = Field(0.9, gt=0, le=1)
    """Tokens are drawn from the fewest that have this share of the probability."""
    max_tokens: int | None = Field(None, ge=1)
    """The most tokens of a text; None: as many as the model takes."""


def write_texts(
    predictor: Predictor, image: Encoded, questions: Sequence[str] | None, settings: WritingConfig, seed: int
) -> list[str]:
    """One text for each encoded picture: what the decoder writes about it, or answers to its question. In inference
    mode. Raises RecipeError as `decoder_tokens`.
    """
    import torch

    from mmflow.models.decoder import beam, decoder_tokens, greedy, nucleus

    loaded, model = predictor.loaded, predictor.model
    assert model.decoder is not None, "the caller asks only models that decode"
    tokens = decoder_tokens("model", loaded.tokenizer)
    longest = min(settings.max_tokens or loaded.config.max_tokens - 1, loaded.config.max_tokens)
    text = None if questions is None else model.encode_text(*predictor.text_inputs(questions))
    memory = model.memory(image, text)
    if settings.search == "greedy":
        written = greedy(model.decoder, memory, tokens, longest)
    elif settings.search == "beam":
        penalty = settings.length_penalty
        written = beam(model.decoder, memory, tokens, longest, width=settings.beams, length_penalty=penalty)
    else:
        generator = torch.Generator().manual_seed(seed)
        written = nucleus(model.decoder, memory, tokens, longest, share=settings.nucleus, generator=generator)
    return [text_of(loaded.tokenizer, ids) for ids in written.token_ids_BT.tolist()]


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Token ids as text, up to the closing token and without special tokens."""
    from tokenizers import decoders

    from mmflow.loading.tokens import special_tokens

    special = special_tokens(tokenizer)
    left_out = {special.pad, special.first, special.last, special.mask, special.unknown}
    kept = [number for number in takewhile(lambda number: number != special.last, ids) if number not in left_out]
    if tokenizer.decoder is not None:
        return str(tokenizer.decode(kept)).strip()
    # A tokenizer that `train_tokenizer` made has no decoder.
    pieces = [str(tokenizer.id_to_token(number)) for number in kept]
    # It splits off every punctuation mark and forgets where spaces were: a hyphen between words is taken to join them.
    return _HYPHEN.sub("-", str(decoders.WordPiece(prefix="##").decode(pieces)).strip())
