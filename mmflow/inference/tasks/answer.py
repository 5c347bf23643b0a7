"""Task `answer`: answers to questions about the picture, those of the sample's metadata or given ones."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmflow.dataset.reader import Sample
from mmflow.inference.generation import WritingConfig, write_texts
from mmflow.inference.result import Columns, Gives, Result, column
from mmflow.inference.tasks.classify import class_scores
from mmflow.loading.text import QUESTIONS

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch
    from mmflow.models.package import LoadedModel


class Answer(Result, WritingConfig):
    """Answers to questions about the picture: by the head `classes` over known answers where the model has one, or
    written by its decoder."""

    task: ClassVar[str] = "answer"
    needs: ClassVar[tuple[Gives, ...]] = (
        Gives({"fused", "class_logits"}),
        Gives({"fused", "decoded from the question"}),
    )
    remedy: ClassVar[str] = "a fusion, and the head classes or a decoder with memory: fused"
    search: Literal["greedy", "beam", "nucleus"] = "greedy"
    """The likeliest token at each step; the likeliest text among several; or tokens drawn from the likeliest."""
    questions: list[str] | None = Field(None, min_length=1)
    """Asked about every picture; None: those in the sample's metadata."""

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """Lists of the same length."""
        return [
            column("questions", pa.list_(pa.string()), "what was asked about the picture"),
            column(
                "answers", pa.list_(pa.string()), 'the model\'s answers, in the same order; "" where it is undecided'
            ),
        ]

    def run(self, batch: Batch, started: Any) -> Columns:
        """All questions of the batch, a batch of them at a time."""
        asked = [
            self.questions or [entry["question"] for entry in question_entries(sample)] for sample in batch.samples
        ]
        texts = [text for theirs in asked for text in theirs]
        rows = np.repeat(np.arange(len(asked)), [len(theirs) for theirs in asked])
        answers, size = list[str](), batch.predictor.batch_size
        for first in range(0, len(texts), size):
            answers += self._answer(batch, rows[first : first + size], texts[first : first + size])
        ends = np.cumsum([0, *(len(theirs) for theirs in asked)])
        by_row = [answers[start:end] for start, end in pairwise(ends)]
        kind = pa.list_(pa.string())
        return {"questions": pa.array(asked, kind), "answers": pa.array(by_row, kind)}

    def _answer(self, batch: Batch, rows: np.ndarray[Any, Any], texts: list[str]) -> list[str]:
        import torch

        from mmflow.inference.predict import take

        predictor = batch.predictor
        if "class_logits" in predictor.gives:
            scores = class_scores(batch, rows, texts)
            clear = (scores == scores.max(axis=1, keepdims=True)).sum(axis=1) == 1
            names = predictor.loaded.classes
            return [names[best] if sure else "" for best, sure in zip(scores.argmax(axis=1), clear, strict=True)]
        image = take(batch.image(), torch.from_numpy(rows).to(predictor.device))
        return write_texts(predictor, image, texts, self, batch.seed + int(rows[0]))


def question_entries(sample: Sample) -> list[dict[str, Any]]:
    """The questions in a sample's metadata: {"question": text, "answers"?: [text, …]}; what is none is left out."""
    entries = sample.metadata.get(QUESTIONS)
    entries = entries if isinstance(entries, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("question"), str)]
