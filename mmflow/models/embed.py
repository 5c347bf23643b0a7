"""Pictures and captions through a packaged model, in batches: what evaluation and scoring share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmflow.loading.batches import normalise, pixels_tensor
from mmflow.loading.decode import decode
from mmflow.loading.reader import Sample
from mmflow.loading.tokens import pad, special_tokens, tokenise
from mmflow.loading.transforms import centre_view
from mmflow.models.package import LoadedModel

Row = TypeVar("Row")
Embeddings = NDArray[np.float32]  # (rows, width), of unit length


def device_of(loaded: LoadedModel) -> torch.device:
    """Where the model is."""
    return next(loaded.model.parameters()).device


@torch.inference_mode()
def embed_images(loaded: LoadedModel, samples: Sequence[Sample], batch_size: int) -> Embeddings:
    """The centre view of each sample's picture, embedded: (samples, width)."""
    side = loaded.config.image_pixels
    rows = []
    for batch in _batched(samples, batch_size):
        views = [centre_view(decode(sample.image, sample.extension, side), side) for sample in batch]
        pixels = normalise(pixels_tensor(views).to(device_of(loaded)), loaded.config.pixel_mean, loaded.config.pixel_std)
        rows.append(loaded.model.embed_image(loaded.model.encode_image(pixels)).cpu().numpy())
    return _stack(rows, loaded)


@torch.inference_mode()
def embed_captions(loaded: LoadedModel, captions: Sequence[str], batch_size: int) -> Embeddings:
    """Each caption embedded: (captions, width)."""
    rows = []
    pad_id = special_tokens(loaded.tokenizer).pad
    for batch in _batched(captions, batch_size):
        ids, mask = pad(tokenise(loaded.tokenizer, batch, loaded.config.max_tokens), pad_id)
        device = device_of(loaded)
        text = loaded.model.encode_text(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        rows.append(loaded.model.embed_text(text).cpu().numpy())
    return _stack(rows, loaded)


def _batched(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _stack(rows: list[Embeddings], loaded: LoadedModel) -> Embeddings:
    return np.concatenate(rows) if rows else np.zeros((0, loaded.config.embedding_width or 0), np.float32)
