"""What a model gives for one batch: each tensor is computed once, when the first loss asks for it.

Losses are computed in one order on every rank and at every step, so the modules of the model are called in one order
too: ZeRO-3 gathers parameters by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import xxhash
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import pad

from mmflow.core.errors import TrainingError
from mmflow.learning.rows import ALONE, Gather, GlobalRows, Ranks, draw_seed, mean_cross_entropy, text_hashes, uniform
from mmflow.loading.tokens import NAMES, SPECIAL, id_of
from mmflow.models.encoders import Encoded, Fused
from mmflow.models.model import Model, Scale

# Shapes: B rows of this rank, N rows of all ranks, T tokens, C columns, E the width of the shared space.


@dataclass(frozen=True)
class MaskingTokens:
    """What masked language modelling must know of a tokenizer."""

    mask: int | None  # None: the tokenizer has no mask token
    ids: tuple[int, ...]  # tokens that stand for no text: never hidden, and never drawn to replace a word
    vocabulary_size: int


def masking_tokens(tokenizer: Tokenizer) -> MaskingTokens:
    """The tokens that the tokenizer marks as special, and mmflow's own, which have no mark."""
    marked = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    own = {number for token in SPECIAL if (number := tokenizer.token_to_id(token)) is not None}
    return MaskingTokens(id_of(tokenizer, NAMES["mask"]), tuple(sorted(marked | own)), tokenizer.get_vocab_size())


class Embeddings(NamedTuple):
    """Image and text embeddings of a batch, of unit length, and the scale of their cosines, (1,)."""

    image_BE: Tensor
    text_BE: Tensor
    logit_scale: Tensor


@dataclass(kw_only=True, eq=False)
class Outputs:
    """A batch of this rank and what the model makes of it."""

    model: Model
    pixels: Tensor  # normalised
    token_ids: Tensor
    token_mask: Tensor
    frame_mask: Tensor | None = None
    keys: Sequence[str] = ()  # rows with one key come from one sample, and are never each other's negatives
    targets: Mapping[str, Tensor]
    rows: GlobalRows
    ranks: Ranks = ALONE
    special: MaskingTokens
    generator: torch.Generator  # in the same state on every rank, and in another at every step
    attention_sides: frozenset[str] = frozenset()  # encoders (image, text) that must give their attention maps
    layers: dict[str, dict[int, Tensor]] = field(
        default_factory=dict
    )  # captured outputs, (B, T, W), by side and number
    places: Mapping[str, Tensor] | None = None  # see MicroBatch

    @cached_property
    def image(self) -> Encoded:
        """The encoded images or clips."""
        return self.model.encode_image(self.pixels, self.frame_mask, attentions="image" in self.attention_sides)

    @cached_property
    def text(self) -> Encoded | None:
        """The encoded texts; None for a model without a text encoder."""
        if self.model.text is None:
            return None
        return self.model.encode_text(self.token_ids, self.token_mask, attentions="text" in self.attention_sides)

    @cached_property
    def image_embedding(self) -> Tensor:
        """(B, E) of unit length, fp32."""
        return self.model.embed_image(self.image)

    @cached_property
    def text_embedding(self) -> Tensor:
        """(B, E) of unit length, fp32."""
        assert self.text is not None, "the recipe is checked: losses on embeddings have a text encoder"
        return self.model.embed_text(self.text)

    @cached_property
    def scale(self) -> Scale:
        """The scale and bias of cosines, (1,) each."""
        scale: Scale = self.model.scale()  # type: ignore[misc]
        return scale

    @property
    def embeddings(self) -> Embeddings:
        """Both embeddings and the scale."""
        return Embeddings(self.image_embedding, self.text_embedding, self.scale.logit_scale)

    @cached_property
    def pair_scores(self) -> Tensor:
        """(N, B): the score of each text of all ranks with each clip of this rank."""
        assert self.text is not None, "a model with pair scores has a text encoder"
        return self.model.score_pairs(self.ranks.gather(self.text.pooled_BW), self.image)

    @cached_property
    def fused(self) -> Fused:
        """Each image fused with its own text."""
        return self.model.fuse(self.image, self.text)

    @property
    def identities(self) -> Tensor:
        """(B, 2) int64: hashes of each row's text and key. Rows that share one are never each other's negatives."""
        key_B = self.rows.columns_B
        if self.keys:
            hashes = [xxhash.xxh3_64_intdigest(key.encode()) - (1 << 63) for key in self.keys]
            key_B = torch.tensor(hashes, device=self.rows.real_B.device)
        return torch.stack((text_hashes(self.token_ids, self.token_mask), key_B), 1)

    def draw_uniform(self, num_columns: int) -> Tensor:
        """(B, C) random numbers in (0, 1), new ones at every call."""
        return uniform(draw_seed(self.generator), self.rows.columns_B, num_columns)

    def gather_places(self, objective: str) -> Gather:
        """Tells an objective how many places each part of the global batch has, given the number of its own."""
        if self.places is None:
            return self.ranks.gather
        places = self.places[objective]
        return lambda _: places

    def mean_cross_entropy(
        self, objective: str, logits: Tensor, targets: Tensor, where: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """This rank's part of the objective's mean, (), as `rows.mean_cross_entropy`."""
        return mean_cross_entropy(logits, targets, where, self.gather_places(objective), label_smoothing)

    def target(self, name: str) -> Tensor:
        """A target of the batch. Raises TrainingError if the loader gives none of that name."""
        if name not in self.targets:
            targets = ", ".join(sorted(self.targets)) or "none"
            raise TrainingError(f"the batches have no target {name!r}, only {targets}; see text and label in loader")
        return self.targets[name]


def gather_encoded(encoded: Encoded, gather: Gather) -> Encoded:
    """The rows of all ranks, their sequences padded to the longest on any rank."""
    sequence_BTW, mask_BT = encoded.sequence_BTW, encoded.mask_BT
    length = sequence_BTW.shape[1]
    padding = int(gather(torch.tensor([length], device=sequence_BTW.device)).max()) - length
    # Image regions have no mask if every image has the same number.
    mask_NT = None if mask_BT is None else gather(pad(mask_BT.to(torch.uint8), (0, padding))).bool()
    return Encoded(gather(pad(sequence_BTW, (0, 0, 0, padding))), gather(encoded.pooled_BW), mask_NT)


def select_rows(encoded: Encoded, rows: Tensor) -> Encoded:
    """The rows with these numbers, in this order."""
    mask_BT = encoded.mask_BT
    return Encoded(encoded.sequence_BTW[rows], encoded.pooled_BW[rows], None if mask_BT is None else mask_BT[rows])
