"""Pictures and captions through a packaged model, in batches: what evaluation and scoring share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmflow.dataset.reader import Sample
from mmflow.imaging.decode import decode
from mmflow.loading.batches import normalise, pixels_tensor
from mmflow.loading.tokens import pad, special_tokens, tokenise
from mmflow.loading.transforms import centre_view, choose_frames
from mmflow.models.package import LoadedModel

Row = TypeVar("Row")
Embeddings = NDArray[np.float32]  # (rows, width), of unit length

# Shapes: B batch, F frames, S side of a picture in pixels, T tokens.


def device_of(loaded: LoadedModel) -> torch.device:
    """Where the model is."""
    return next(loaded.model.parameters()).device


def image_inputs(loaded: LoadedModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
    """The centre views as the model reads them: pictures (B, 3, S, S) and None; of a model of clips, frames evenly
    spread over each (B, F, 3, S, S) and which are real (B, F)."""
    side, video = loaded.config.image_pixels, loaded.config.video
    bodies: list[list[bytes]] = [[sample.image] for sample in samples]
    if video is not None:
        whole = [(sample.image, *sample.frames) for sample in samples]
        bodies = [[clip[number] for number in choose_frames(len(clip), video.max_frames)] for clip in whole]
    views = [
        [centre_view(decode(body, sample.extension, side), side) for body in clip]
        for sample, clip in zip(samples, bodies, strict=True)
    ]
    flat = pixels_tensor([view for clip in views for view in clip]).to(device_of(loaded))
    pixels = normalise(flat, loaded.config.pixel_mean, loaded.config.pixel_std)
    if video is None:
        return pixels, None
    lengths = torch.tensor([len(clip) for clip in views], device=pixels.device)
    frame_mask = torch.arange(int(lengths.max()), device=pixels.device) < lengths[:, None]
    clips = pixels.new_zeros(*frame_mask.shape, *pixels.shape[1:])
    clips[frame_mask] = pixels
    return clips, frame_mask


def text_inputs(loaded: LoadedModel, texts: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and their mask; longer texts are cut to the model's own length, or to `max_tokens`."""
    rows = tokenise(loaded.tokenizer, texts, max_tokens or loaded.config.max_tokens)
    ids, mask = pad(rows, special_tokens(loaded.tokenizer).pad)
    return torch.from_numpy(ids).to(device_of(loaded)), torch.from_numpy(mask).to(device_of(loaded))


@torch.inference_mode()
def embed_images(loaded: LoadedModel, samples: Sequence[Sample], batch_size: int) -> Embeddings:
    """The centre view of each sample's picture, or frames of its clip, embedded: (samples, width)."""
    model = loaded.model
    rows = [
        model.embed_image(model.encode_image(*image_inputs(loaded, batch))).cpu().numpy()
        for batch in batched(samples, batch_size)
    ]
    return _stack(rows, loaded)


@torch.inference_mode()
def embed_captions(
    loaded: LoadedModel, captions: Sequence[str], batch_size: int, max_tokens: int | None = None
) -> Embeddings:
    """Each caption embedded: (captions, width), longer ones cut as in `text_inputs`."""
    model = loaded.model
    rows = [
        model.embed_text(model.encode_text(*text_inputs(loaded, batch, max_tokens))).cpu().numpy()
        for batch in batched(captions, batch_size)
    ]
    return _stack(rows, loaded)


def class_embeddings(loaded: LoadedModel, prompts: Mapping[str, Sequence[str]], batch_size: int) -> Embeddings:
    """(classes, width), of unit length: the mean over each class's prompts, in the order of `prompts`."""
    means = np.stack([embed_captions(loaded, texts, batch_size).mean(axis=0) for texts in prompts.values()])
    unit: Embeddings = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def batched(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """The rows, `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _stack(rows: list[Embeddings], loaded: LoadedModel) -> Embeddings:
    return np.concatenate(rows) if rows else np.zeros((0, loaded.config.embedding_width or 0), np.float32)
