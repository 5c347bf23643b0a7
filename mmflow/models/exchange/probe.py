"""Inputs by which an exported model is compared with the one it came from."""

from __future__ import annotations

import torch
from torch import Tensor

from mmflow.loading.tokens import pad, special_tokens, tokenise
from mmflow.models.package import LoadedModel

TOLERANCE = 1e-4
"""The largest difference of logits, or of embeddings, with which an export counts as the same model."""


def probe(loaded: LoadedModel, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random pictures (rows, 3, side, side), and random texts of different lengths as ids and mask (rows, T).

    The texts go through the tokenizer, so that they have the special tokens that the text encoder looks for.
    """
    random = torch.Generator().manual_seed(seed)
    side = loaded.config.image_pixels
    pixels = torch.randn(rows, 3, side, side, generator=random)
    tokenizer, room = loaded.tokenizer, loaded.config.max_tokens
    lengths = torch.randint(1, max(2, room // 2), (rows,), generator=random).tolist()
    texts = [
        tokenizer.decode(torch.randint(0, tokenizer.get_vocab_size(), (length,), generator=random).tolist())
        for length in lengths
    ]
    ids, mask = pad(tokenise(tokenizer, texts, room), special_tokens(tokenizer).pad)
    return pixels, torch.from_numpy(ids), torch.from_numpy(mask)
