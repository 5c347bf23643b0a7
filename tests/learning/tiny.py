"""Shared by tests of objectives: a model of a few hundred weights with every output, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmflow.learning.outputs import MaskingTokens, Outputs
from mmflow.learning.rows import ALONE, GlobalRows, Ranks, global_rows
from mmflow.models.encoders import Encoded, Fused
from mmflow.models.model import LogitScale

SIDE, PATCH, WIDTH, SHARED, VOCABULARY, CLASSES, TOKENS = 8, 4, 5, 4, 23, 3, 7
SPECIAL = MaskingTokens(mask=4, ids=(0, 1, 2, 3, 4), vocabulary_size=VOCABULARY)


def alone(rows: Tensor) -> Tensor:
    """The gather, and the passing on, of one rank."""
    return rows


def rows_of(real: Tensor) -> GlobalRows:
    return global_rows(real)


def all_real(rows: int) -> GlobalRows:
    return rows_of(torch.ones(rows, dtype=torch.bool))


def unit(rows: int, width: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, width, generator=random, dtype=torch.float64), dim=1).float()


class TinyModel(nn.Module):
    """Gives all that `Model` can, by the same names; every row on its own, nothing random."""

    gives = frozenset(("embeddings",))  # it compares by these, and not pair by pair

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.text = nn.Embedding(VOCABULARY, WIDTH)
        self.image_projection = nn.Linear(WIDTH, SHARED)
        self.text_projection = nn.Linear(WIDTH, SHARED)
        self.scale = LogitScale(0.2, bias=-1.0)
        self.looks = nn.Linear(WIDTH, WIDTH)
        self.matching = nn.Linear(WIDTH, 2)
        self.words = nn.Linear(WIDTH, VOCABULARY)
        self.heads = nn.ModuleDict({"masked_image": nn.Linear(WIDTH, 3 * PATCH**2)})
        self.heads["masked_image"].side = PATCH
        self.classes = nn.Linear(WIDTH, CLASSES)
        self.decoder = nn.Embedding(VOCABULARY, WIDTH)

    def encode_image(self, pixels: Tensor, frame_mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        sequence = self.image(pixels).flatten(2).transpose(1, 2).tanh()
        return Encoded(sequence, sequence.mean(1))

    def encode_text(self, token_ids: Tensor, token_mask: Tensor, *, attentions: bool = False) -> Encoded:
        mask = token_mask.bool()
        sequence = self.text(token_ids).masked_fill(~mask[..., None], 0.0)
        return Encoded(sequence, sequence.sum(1) / mask.sum(1, keepdim=True).clamp(min=1), mask)

    def embed_image(self, image: Encoded) -> Tensor:
        return nn.functional.normalize(self.image_projection(image.pooled_BW), dim=-1)

    def embed_text(self, text: Encoded) -> Tensor:
        return nn.functional.normalize(self.text_projection(text.pooled_BW), dim=-1)

    def fuse(self, image: Encoded, text: Encoded) -> Fused:
        """Each token looks at the regions, each region at the mean token."""
        assert text.mask_BT is not None
        regions, words = image.sequence_BTW, text.sequence_BTW
        seen = words + (self.looks(words) @ regions.transpose(1, 2)).softmax(-1) @ regions
        seen = seen.masked_fill(~text.mask_BT[..., None], 0.0)
        pooled = seen.sum(1) / text.mask_BT.sum(1, keepdim=True).clamp(min=1)
        return Fused(seen, regions + text.pooled_BW[:, None], pooled * image.pooled_BW, None)

    def matching_logits(self, fused: Fused) -> Tensor:
        return self.matching(fused.pooled_BW)

    def masked_language_logits(self, fused: Fused) -> Tensor:
        return self.words(fused.text_BTW)

    def masked_image_pixels(self, fused: Fused) -> Tensor:
        return self.heads["masked_image"](fused.image_BRW)

    def class_logits(self, fused: Fused) -> Tensor:
        return self.classes(fused.pooled_BW)

    def memory(self, image: Encoded, text: Encoded | None = None) -> Encoded:
        return image

    def decode(self, memory: Encoded, token_ids: Tensor) -> Tensor:
        so_far = self.decoder(token_ids).cumsum(1) + memory.sequence_BTW.mean(1, keepdim=True)
        return self.words(so_far.tanh())


def batch(rows: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of `Outputs`: captions of one to five words between an opening and a closing token, padded."""
    random = torch.Generator().manual_seed(seed)
    words = torch.randint(1, TOKENS - 1, (rows, 1), generator=random)
    places = torch.arange(TOKENS)
    ids = torch.randint(5, VOCABULARY, (rows, TOKENS), generator=random)
    ids = ids.masked_fill(places == 0, 2).masked_fill(places == words + 1, 3).masked_fill(places > words + 1, 0)
    return {
        "pixels": torch.randn(rows, 3, SIDE, SIDE, generator=random),
        "token_ids": ids,
        "token_mask": (places <= words + 1).long(),
        "keys": tuple(f"sample {number}" for number in range(rows)),
        "targets": {
            "label": torch.randint(-1, CLASSES, (rows,), generator=random),
            "answer": torch.randint(-1, CLASSES, (rows,), generator=random),
            "answer_scores": torch.rand(rows, CLASSES, generator=random),
            "answer_ids": ids.flip(0),
            "answer_mask": (places <= words + 1).long().flip(0),
        },
    }


def outputs_of(
    model: Any, arguments: dict[str, Any], rows: GlobalRows, *, ranks: Ranks = ALONE, seed: int = 3
) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(model=model, **arguments, rows=rows, ranks=ranks, special=SPECIAL, generator=generator)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of every weight; zeros where the loss does not reach one."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }
