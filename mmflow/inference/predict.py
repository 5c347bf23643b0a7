"""A packaged model applied to a batch of rows: what several tasks read of it is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmflow.dataset.reader import Sample
from mmflow.inference.prepare import Looks, Prepared, decode_views
from mmflow.loading.batches import normalise
from mmflow.loading.tokens import pad, special_tokens, tokenise
from mmflow.models.encoders import Encoded
from mmflow.models.package import LoadedModel

# Shapes: B batch, F frames, S side of a picture in pixels, T tokens, A texts, C classes, W the width of the shared
# space.

Floats = NDArray[np.float32]

LIKE_TOKENS = 32  # texts whose lengths fall into the same step of so many tokens are read together


class Predictor:
    """A loaded model, on its device. On a GPU it computes in bf16, elsewhere in fp32. Results are numpy arrays."""

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.batch_size = batch_size

    @property
    def gives(self) -> frozenset[str]:
        """What the model can be asked for (`ModelConfig.gives`)."""
        return self.model.gives

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def precision(self) -> AbstractContextManager[object]:
        """bf16 on a GPU, where it is several times as fast as fp32; no change elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def looks(self, changes: tuple[str, ...] = ("",)) -> Looks:
        """How the model looks at pictures."""
        video = self.loaded.config.video
        return Looks(self.loaded.config.image_pixels, video.max_frames if video else 0, changes)

    def image_inputs(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """The stored pictures or clips of a few samples, decoded here. Raises CorruptArtifactError."""
        clips = [decode_views(sample, self.looks()) for sample in samples]
        pixels = np.stack([view for clip in clips for view in clip])
        return self.pixel_inputs(pixels, np.array([len(clip) for clip in clips]))

    def pixel_inputs(self, views: NDArray[np.uint8], frames_B: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Decoded views (sum of frames, S, S, 3) as the model reads them: (B, 3, S, S) and None. A model of clips reads
        (B, F, 3, S, S) and which of the frames are real (B, F)."""
        config = self.loaded.config
        # Ray's object store gives arrays that cannot be written to, which torch warns of and this does not do.
        writable = views if views.flags.writeable else views.copy()
        flat = torch.from_numpy(writable).permute(0, 3, 1, 2).to(self.device)
        pixels = normalise(flat, config.pixel_mean, config.pixel_std)
        if config.video is None:
            return pixels, None
        lengths = torch.from_numpy(frames_B).to(self.device)
        frame_mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        padded = pixels.new_zeros(*frame_mask.shape, *pixels.shape[1:])
        padded[frame_mask] = pixels
        return padded, frame_mask

    def text_inputs(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) and their mask; longer texts are cut to `max_tokens`, or to the model's own length."""
        tokenizer = self.loaded.tokenizer
        rows = tokenise(tokenizer, texts, max_tokens or self.loaded.config.max_tokens)
        ids, mask = pad(rows, special_tokens(tokenizer).pad)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens that the model reads of each text."""
        return [len(ids) for ids in tokenise(self.loaded.tokenizer, texts, self.loaded.config.max_tokens)]

    def encode(self, samples: Sequence[Sample], texts: Sequence[str] | None = None) -> tuple[Encoded, Encoded | None]:
        """A few stored pictures or clips through their encoder, and their texts where there are any."""
        image = self.model.encode_image(*self.image_inputs(samples))
        return image, None if texts is None else self.model.encode_text(*self.text_inputs(texts))

    @torch.inference_mode()
    def embed_pictures(self, samples: Sequence[Sample]) -> Floats:
        """(N, W) of unit length, of a few stored pictures or clips."""
        with self.precision():
            return to_numpy(self.model.embed_image(self.encode(samples)[0]))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], max_tokens: int | None = None) -> Floats:
        """(A, W) of unit length; texts are cut as in `text_inputs`. Those of like length are read together."""
        groups = defaultdict[int, list[int]](list)
        cut = tokenise(self.loaded.tokenizer, texts, max_tokens or self.loaded.config.max_tokens)
        for place, tokens in enumerate(cut):
            groups[len(tokens) // LIKE_TOKENS].append(place)
        embedded = np.zeros((len(texts), self.loaded.config.embedding_width or 0), np.float32)
        pad_id = special_tokens(self.loaded.tokenizer).pad
        for places in groups.values():
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                ids, mask = pad([cut[row] for row in batch], pad_id)
                padded = (torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device))
                with self.precision():
                    embedded[batch] = to_numpy(self.model.embed_text(self.model.encode_text(*padded)))
        return embedded

    def embed_classes(self, prompts: Mapping[str, Sequence[str]]) -> Floats:
        """(C, W) of unit length: the mean embedding of each class's prompts, in the order of `prompts`."""
        means = np.stack([self.embed_texts(texts).mean(axis=0) for texts in prompts.values()])
        unit: Floats = means / np.linalg.norm(means, axis=1, keepdims=True)
        return unit


@dataclass(frozen=True)
class Batch:
    """Good rows of a shard in front of a model. Tasks run in `torch.inference_mode` and the predictor's precision."""

    predictor: Predictor
    prepared: Prepared
    shard: str  # its name
    first: int  # the row of the shard that it begins with
    seed: int  # of texts drawn at random, the batch's own
    stored: Mapping[str, Floats]  # columns of results that were computed before: embeddings (B, W)
    _encoded: dict[str, Encoded] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        """The rows, without their pictures."""
        return self.prepared.samples

    @property
    def rows(self) -> NDArray[np.int64]:
        """(B,): their places in the shard."""
        return self.first + self.prepared.good

    def image(self, change: str = "") -> Encoded:
        """The pictures or clips through their encoder."""
        if change not in self._encoded:
            pixels = self.predictor.pixel_inputs(self.prepared.pixels[change], self.prepared.frames)
            self._encoded[change] = self.predictor.model.encode_image(*pixels)
        return self._encoded[change]

    def embed_images(self, change: str = "") -> Floats:
        """(B, W) of unit length."""
        return to_numpy(self.predictor.model.embed_image(self.image(change)))

    @property
    def stored_image_embeddings(self) -> Floats:
        """(B, W) as task `embed` stores them by default, whether it has done so or not: float16's numbers in fp32."""
        if "image_embedding" in self.stored:
            return self.stored["image_embedding"]
        rounded: Floats = self.embed_images().astype(np.float16).astype(np.float32)
        return rounded


def to_numpy(tensor: Tensor) -> Floats:
    """On the CPU, in fp32."""
    values: Floats = tensor.float().cpu().numpy()
    return values


def take(encoded: Encoded, rows_B: Tensor) -> Encoded:
    """Some rows of what an encoder gave, any of them several times."""
    mask = encoded.mask_BT
    return Encoded(encoded.sequence_BTW[rows_B], encoded.pooled_BW[rows_B], None if mask is None else mask[rows_B])
