"""Task `caption`: what the model's decoder writes about the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from pydantic import Field, model_validator

from mmflow.inference.generation import WritingConfig, write_texts
from mmflow.inference.result import Columns, Gives, Result, column

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch
    from mmflow.models.package import LoadedModel


class Caption(Result, WritingConfig):
    """What the model's decoder writes about the picture."""

    task: ClassVar[str] = "caption"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"decoded from the image"}),)
    remedy: ClassVar[str] = "a decoder with memory: image"
    candidates: int = Field(1, ge=1)
    """Captions drawn for each picture, by search: nucleus."""

    @model_validator(mode="after")
    def _drawn(self) -> Caption:
        if self.candidates > 1 and self.search != "nucleus":
            raise ValueError(f"candidates: {self.candidates} equal captions; set search to nucleus, which draws them")
        return self

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """A list of texts."""
        return [column("written_captions", pa.list_(pa.string()), "captions that the model's decoder wrote")]

    def run(self, batch: Batch, started: Any) -> Columns:
        """Candidates of a batch are drawn one after another."""
        drawn = [
            write_texts(batch.predictor, batch.image(), None, self, batch.seed + number)
            for number in range(self.candidates)
        ]
        rows = [list(texts) for texts in zip(*drawn, strict=True)]
        return {"written_captions": pa.array(rows, pa.list_(pa.string()))}
