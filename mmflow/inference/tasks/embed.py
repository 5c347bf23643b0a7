"""Task `embed`: pictures and captions as vectors of the shared space, and how similar a picture is to its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from mmflow.dataset.reader import Caption
from mmflow.inference.changes import PERTURBATIONS, Perturbation
from mmflow.inference.result import Columns, Gives, Result, column, lists_of, vectors, vectors_of

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch
    from mmflow.models.package import LoadedModel

Dtype = Literal["float16", "float32"]
SPACE = "a text encoder and an embedding_width"


class ImageEmbeddings(Result):
    """The picture or clip as a vector of unit length."""

    task: ClassVar[str] = "image_embedding"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"embeddings"}),)
    remedy: ClassVar[str] = SPACE
    dtype: Dtype = "float16"
    """Of what is stored; float16 keeps three digits, in half the space."""
    change: str = ""
    """A change of the picture, as in `inference/changes.py`."""

    @property
    def changes(self) -> tuple[str, ...]:
        """One."""
        return (self.change,)

    @property
    def column(self) -> str:
        """The name of its column."""
        return f"image_embedding{self.change and '_' + self.change}"

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """One vector."""
        kind = vectors(loaded.config.embedding_width or 0, self.dtype)
        return [column(self.column, kind, "the picture or clip in the shared space, of unit length")]

    def run(self, batch: Batch, started: Any) -> Columns:
        """Through the image encoder."""
        return {self.column: vectors_of(batch.embed_images(self.change), self.dtype)}


class CaptionEmbeddings(Result):
    """Captions as vectors of unit length."""

    task: ClassVar[str] = "caption_embedding"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"embeddings"}),)
    remedy: ClassVar[str] = SPACE
    language: str = "en"
    """Which caption is read: the first in this language, or else the first of all."""
    dtype: Dtype = "float16"

    @property
    def changes(self) -> tuple[str, ...]:
        """It reads no picture."""
        return ()

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """One vector."""
        kind = vectors(loaded.config.embedding_width or 0, self.dtype)
        return [column("caption_embedding", kind, "the caption in the shared space, of unit length; null without one")]

    def run(self, batch: Batch, started: Any) -> Columns:
        """Through the text encoder."""
        captions = [first_caption(sample.captions, self.language) for sample in batch.samples]
        missing = np.array([caption is None for caption in captions])
        embedded = batch.predictor.embed_texts([caption or "" for caption in captions])
        return {"caption_embedding": vectors_of(embedded, self.dtype, missing)}


class AllCaptionEmbeddings(Result):
    """Every caption in a language as a vector of unit length."""

    task: ClassVar[str] = "all_caption_embeddings"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"embeddings"}),)
    remedy: ClassVar[str] = SPACE
    language: str
    max_tokens: int | None = None
    """Captions are cut to so many tokens; None: to what the model reads."""
    change: Perturbation | None = None
    """A change of the captions; those without anything to change have null."""

    @property
    def changes(self) -> tuple[str, ...]:
        """It reads no picture."""
        return ()

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """A list of vectors."""
        kind = pa.list_(vectors(loaded.config.embedding_width or 0, "float16"))
        return [column("caption_embeddings", kind, "the captions in the language in the shared space")]

    def run(self, batch: Batch, started: Any) -> Columns:
        """All captions of the batch."""
        own = [captions_in(sample.captions, self.language) for sample in batch.samples]
        texts: list[str | None] = [text for theirs in own for text in theirs]
        if self.change is not None:
            texts = [PERTURBATIONS[self.change](text) for text in texts if text is not None]
        missing = np.array([text is None for text in texts], np.bool_)
        embedded = batch.predictor.embed_texts([text or "" for text in texts], self.max_tokens)
        return {"caption_embeddings": lists_of(vectors_of(embedded, "float16", missing), list(map(len, own)))}


def captions_in(captions: Sequence[Caption], language: str) -> list[str]:
    """The texts of the captions in a language."""
    return [caption.text for caption in captions if caption.language == language]


def first_caption(captions: Sequence[Caption], language: str) -> str | None:
    """The first caption in the language, or else the first of all."""
    preferred = sorted(captions, key=lambda caption: caption.language != language)
    return preferred[0].text if preferred else None
