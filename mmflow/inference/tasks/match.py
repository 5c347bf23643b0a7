"""Task `match`: the odds that a caption belongs to its picture, by the head that reads both together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from mmflow.inference.result import Columns, Floats, Gives, Result, column
from mmflow.inference.tasks.embed import first_caption

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch
    from mmflow.models.package import LoadedModel


class Match(Result):
    """The odds that the caption belongs to the picture."""

    task: ClassVar[str] = "match"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"matching_logits"}),)
    remedy: ClassVar[str] = "a fusion and the head matching"
    language: str = "en"
    """Which caption is read: the first in this language, or else the first of all."""

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """One number."""
        return [
            column("match", pa.float32(), "log-odds that the caption belongs to the picture; null without a caption")
        ]

    def run(self, batch: Batch, started: Any) -> Columns:
        """Rows with a caption, all at once."""
        captions = [first_caption(sample.captions, self.language) for sample in batch.samples]
        rows = np.array([row for row, caption in enumerate(captions) if caption is not None], np.int64)
        odds = np.zeros(len(captions), np.float32)
        if len(rows):
            odds[rows] = match_odds(batch, rows, [caption for caption in captions if caption is not None])
        return {"match": pa.array(odds, mask=np.array([caption is None for caption in captions]))}


def match_odds(batch: Batch, rows_P: np.ndarray[Any, Any], texts: list[str]) -> Floats:
    """(P,) log-odds that each text belongs to the picture of its row, a batch of pairs at a time."""
    import torch

    from mmflow.inference.predict import take, to_numpy

    predictor, odds = batch.predictor, []
    for first in range(0, len(texts), predictor.batch_size):
        pairs = slice(first, first + predictor.batch_size)
        image = take(batch.image(), torch.from_numpy(rows_P[pairs]).to(predictor.device))
        text = predictor.model.encode_text(*predictor.text_inputs(texts[pairs]))
        logits_B2 = to_numpy(predictor.model.matching_logits(predictor.model.fuse(image, text)))
        odds.append(logits_B2[:, 1] - logits_B2[:, 0])
    return np.concatenate(odds)
