"""Task `classify`: the classes that the model's head `classes` tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmflow.inference.result import Columns, Floats, Gives, Result, column
from mmflow.inference.tasks.embed import first_caption
from mmflow.inference.tasks.zero_shot import softmax

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch
    from mmflow.models.package import LoadedModel


class Classify(Result):
    """The likeliest of the classes that the model was trained on."""

    task: ClassVar[str] = "classify"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"class_logits"}),)
    remedy: ClassVar[str] = "the head classes"
    language: str = "en"
    """A model that reads picture and caption together is given the first caption in this language, or else the first of
    all, or nothing."""
    top: int = Field(5, ge=1)
    """How many classes are kept, the best first."""

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """Lists of the same length, the best class first."""
        return [
            column("labels", pa.list_(pa.string()), "the likeliest classes by the model's head, the best first"),
            column(
                "label_odds", pa.list_(pa.float32()), "their probabilities; two that are equal share the first place"
            ),
        ]

    def run(self, batch: Batch, started: Any) -> Columns:
        """Logits of all classes."""
        texts = None
        if "fused" in batch.predictor.gives:
            texts = [first_caption(sample.captions, self.language) or "" for sample in batch.samples]
        odds = softmax(class_scores(batch, np.arange(len(batch.samples)), texts))
        best = np.argsort(-odds, axis=1, kind="stable")[:, : self.top]
        names = np.array(batch.predictor.loaded.classes, dtype=object)
        return {
            "labels": pa.array(names[best].tolist(), pa.list_(pa.string())),
            "label_odds": pa.array(np.take_along_axis(odds, best, 1).tolist(), pa.list_(pa.float32())),
        }


def class_scores(batch: Batch, rows_N: np.ndarray[Any, Any], texts: list[str] | None) -> Floats:
    """(N, C) logits of the package's classes or answers for pictures of the batch, read with a text where there is
    one."""
    import torch

    from mmflow.inference.predict import take, to_numpy

    predictor = batch.predictor
    image = take(batch.image(), torch.from_numpy(rows_N).to(predictor.device))
    text = None if texts is None else predictor.model.encode_text(*predictor.text_inputs(texts))
    return to_numpy(predictor.model.class_logits(predictor.model.fuse(image, text)))
