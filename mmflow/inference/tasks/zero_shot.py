"""Task `zero_shot`: the classes whose descriptions are nearest to the picture (CLIP, arXiv 2103.00020, 3.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from mmflow.core.config import Config
from mmflow.inference.result import Columns, Floats, Gives, Result, column
from mmflow.inference.tasks.embed import SPACE, ImageEmbeddings

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch, Predictor
    from mmflow.models.package import LoadedModel


class ClassTexts(Config):
    """Classes by texts that describe them."""

    prompts: dict[str, list[str]] = Field(min_length=2)
    """Class → texts that describe it; their embeddings are averaged."""
    templates: list[str] = Field(default_factory=lambda: ["{}"], min_length=1)
    """Sentences that each of these texts is put into in place of {}, such as "a photo of a {}"; their embeddings are
    averaged too."""

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the text to stand in")
        return templates

    @property
    def texts(self) -> dict[str, list[str]]:
        """Class → every one of its texts in every template."""
        return {
            name: [template.replace("{}", text) for template in self.templates for text in texts]
            for name, texts in self.prompts.items()
        }


class ZeroShot(Result, ClassTexts):
    """The classes whose descriptions are nearest to the picture."""

    task: ClassVar[str] = "zero_shot"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"embeddings"}),)
    remedy: ClassVar[str] = SPACE
    top: int = Field(5, ge=1)
    """How many classes are kept, the best first."""

    @property
    def reads(self) -> tuple[Result, ...]:
        """Stored embeddings, where there are any."""
        return (ImageEmbeddings(),)

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """Lists of the same length, the best class first."""
        return [
            column("classes", pa.list_(pa.string()), "the classes nearest to the picture, the best first"),
            column("class_odds", pa.list_(pa.float32()), "their probabilities among all classes, at the model's scale"),
            column("class_similarity", pa.list_(pa.float32()), "their cosines with the picture"),
        ]

    def start(self, predictor: Predictor) -> Floats:
        """The classes (C, W)."""
        return predictor.embed_classes(self.texts)

    def run(self, batch: Batch, started: Floats) -> Columns:
        """Cosines with every class."""
        scale = batch.predictor.model.scale
        assert scale is not None, "`needs` asks for embeddings"
        similarity = batch.stored_image_embeddings @ started.T
        odds = softmax(similarity * float(scale().logit_scale))
        best = np.argsort(-similarity, axis=1, kind="stable")[:, : self.top]
        names = np.array(list(self.prompts), dtype=object)
        return {
            "classes": pa.array(names[best].tolist(), pa.list_(pa.string())),
            "class_odds": pa.array(np.take_along_axis(odds, best, 1).tolist(), pa.list_(pa.float32())),
            "class_similarity": pa.array(np.take_along_axis(similarity, best, 1).tolist(), pa.list_(pa.float32())),
        }


def softmax(scores_BC: Floats) -> Floats:
    """Probabilities (B, C) of logits."""
    odds = np.exp(scores_BC - scores_BC.max(axis=1, keepdims=True))
    probabilities: Floats = odds / odds.sum(axis=1, keepdims=True)
    return probabilities
