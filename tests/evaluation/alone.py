"""What a model says of each row by itself, by plain calls: what examinations of whole splits are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.inference.changes import changed
from mmflow.inference.predict import Predictor
from mmflow.inference.prepare import decode_views
from mmflow.models.encoders import Encoded
from mmflow.models.package import LoadedModel


class Alone:
    """A model in front of the samples of split held_out, one at a time."""

    def __init__(self, loaded: LoadedModel, dataset: Dataset) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.predictor = Predictor(loaded, 1)
        self.samples = list(Reader(dataset, "held_out"))

    def captions(self, language: str = "en") -> tuple[list[str], NDArray[np.int64]]:
        """All captions in a language, and the row of each."""
        pairs = [
            (caption.text, row)
            for row, sample in enumerate(self.samples)
            for caption in sample.captions
            if caption.language == language
        ]
        return [text for text, _ in pairs], np.array([row for _, row in pairs])

    @torch.inference_mode()
    def image(self, sample: Sample, change: str = "") -> Encoded:
        """A picture or clip, as it is or changed."""
        views = changed(decode_views(sample, self.predictor.looks()), change, sample.key)
        return self.model.encode_image(*self.predictor.pixel_inputs(np.stack(views), np.array([len(views)])))

    @torch.inference_mode()
    def text(self, text: str, max_tokens: int | None = None) -> Encoded:
        return self.model.encode_text(*self.predictor.text_inputs([text], max_tokens))

    @torch.inference_mode()
    def images(self, change: str = "") -> NDArray[np.float32]:
        """(rows, width) as they are stored, in float16's numbers."""
        return stored([self.model.embed_image(self.image(sample, change))[0] for sample in self.samples])

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], max_tokens: int | None = None) -> NDArray[np.float32]:
        """(texts, width) as they are stored."""
        return stored([self.model.embed_text(self.text(text, max_tokens))[0] for text in texts])

    @torch.inference_mode()
    def match(self, text: str, sample: Sample) -> float:
        """The log-odds that a text belongs to a picture."""
        no, yes = self.model.matching_logits(self.model.fuse(self.image(sample), self.text(text)))[0].tolist()
        return float(yes - no)

    @torch.inference_mode()
    def classes(self, sample: Sample, text: str | None = None) -> NDArray[np.float32]:
        """(classes,) logits of a picture, read with a text where there is one."""
        fused = self.model.fuse(self.image(sample), None if text is None else self.text(text))
        logits: NDArray[np.float32] = self.model.class_logits(fused)[0].numpy()
        return logits


def stored(vectors: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """Embeddings after they were written as float16."""
    return torch.stack(list(vectors)).numpy().astype(np.float16).astype(np.float32)
