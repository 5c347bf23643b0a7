"""What a model gives for one batch: each tensor computed once, when the first objective asks for it.

Objectives run in one order on every rank and at every step, so the calls of the model's modules do too (ZeRO-3 gathers
parameters by that order).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.core.errors import TrainingError
from mmflow.learning.rows import Gather, GlobalRows, PassOn
from mmflow.loading.tokens import NAMES, SPECIAL, id_of
from mmflow.models.encoders import Encoded, Fused
from mmflow.models.model import Model, Scale

# Shapes: B rows of this rank, T tokens, E the width of the shared space.


@dataclass(frozen=True)
class MaskingTokens:
    """What masked language modelling must know of a tokenizer."""

    mask: int | None  # None: the tokenizer has no token to hide a word behind
    ids: tuple[int, ...]  # tokens that stand for no text: never hidden, never drawn in place of another
    vocabulary_size: int


def masking_tokens(tokenizer: Tokenizer) -> MaskingTokens:
    """Those that the tokenizer marks as special, and those of our own, which carry no mark."""
    marked = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    named = {number for token in SPECIAL if (number := tokenizer.token_to_id(token)) is not None}
    mask = id_of(tokenizer, NAMES["mask"])
    return MaskingTokens(mask, tuple(sorted(marked | named)), tokenizer.get_vocab_size())


class Outputs:
    """A batch of this rank and what the model makes of it."""

    def __init__(
        self,
        model: Model,
        *,
        pixels: Tensor,
        token_ids: Tensor,
        token_mask: Tensor,
        frame_mask: Tensor | None = None,
        keys: Sequence[str] = (),
        targets: Mapping[str, Tensor],
        rows: GlobalRows,
        gather: Gather,
        pass_on: PassOn,
        special: MaskingTokens,
        generator: torch.Generator,
        attentions: frozenset[str] = frozenset(),
        places: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`pixels` are normalised. `keys` (B of them, or none) tell rows of one sample, which are never each other's
        negatives. `generator` must be in the same state on every rank, and be another's at every step. `attentions` are
        the sides, image and text, whose encoders must give their maps. `places` are given for a micro-batch: by
        objective, how many places to learn from each micro-batch of every rank has, (parts,) int64."""
        self.model = model
        self.pixels = pixels
        self.token_ids = token_ids
        self.token_mask = token_mask
        self.frame_mask = frame_mask
        self.keys = keys
        self.targets = targets
        self.rows = rows
        self.gather = gather
        self.pass_on = pass_on
        self.special = special
        self.generator = generator
        self.attentions = attentions
        self.places = places

    @cached_property
    def image(self) -> Encoded:
        """The pictures, or clips, as their encoder leaves them."""
        return self.model.encode_image(self.pixels, self.frame_mask, attentions="image" in self.attentions)

    @cached_property
    def text(self) -> Encoded | None:
        """The texts as their encoder leaves them; None for a model that reads none."""
        if self.model.text is None:
            return None
        return self.model.encode_text(self.token_ids, self.token_mask, attentions="text" in self.attentions)

    @cached_property
    def image_embedding(self) -> Tensor:
        """(B, E) of unit length, fp32."""
        return self.model.embed_image(self.image)

    @cached_property
    def text_embedding(self) -> Tensor:
        """(B, E) of unit length, fp32."""
        assert self.text is not None, "check() has seen that the model gives embeddings"
        return self.model.embed_text(self.text)

    @cached_property
    def pair_scores(self) -> Tensor:
        """(N, B): the score of each text of all ranks with each clip of this one."""
        assert self.text is not None, "check() has seen that the model gives pair scores"
        return self.model.score_pairs(self.gather(self.text.pooled_BW), self.image)

    @cached_property
    def scale(self) -> Scale:
        """What cosines are multiplied by and shifted by, (1,) each."""
        scale: Scale = self.model.scale()  # type: ignore[misc]
        return scale

    @cached_property
    def fused(self) -> Fused:
        """Each picture with its own text."""
        return self.model.fuse(self.image, self.text)

    @cached_property
    def key_hashes(self) -> Tensor:
        """(B,) int64: equal for rows of one sample. Each row's own number where there are no keys."""
        if not self.keys:
            return self.rows.columns_B
        hashes = [xxhash.xxh3_64_intdigest(key.encode()) - (1 << 63) for key in self.keys]
        return torch.tensor(hashes, device=self.rows.real_B.device)

    def gather_places(self, objective: str) -> Gather:
        """What tells an objective how many places each part of the batch has, given how many there are here."""
        if self.places is None:
            return self.gather
        places = self.places[objective]
        return lambda _: places

    def target(self, name: str) -> Tensor:
        """A target of the batch. Raises TrainingError where the loader gives none of that name."""
        if name not in self.targets:
            given = ", ".join(sorted(self.targets)) or "none"
            raise TrainingError(f"the batches carry no target {name!r} ({given}); see text and label in loader")
        return self.targets[name]
