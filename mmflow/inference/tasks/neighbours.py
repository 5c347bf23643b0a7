"""Task `neighbours`: the nearest pictures or captions of another scored dataset, exactly."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmflow.core.config import OPERATIONAL, Uri
from mmflow.core.errors import MisuseError
from mmflow.inference.mapped import Mapped, mapped
from mmflow.inference.result import Columns, Gives, Result, column
from mmflow.inference.scores import Scores, Side, open_scores
from mmflow.inference.tasks.embed import SPACE, ImageEmbeddings

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch, Predictor
    from mmflow.models.package import LoadedModel

# Shapes: B rows of a batch, K nearest, W width of the embeddings.


class Neighbours(Result):
    """The nearest pictures or captions of another dataset that the same model has scored."""

    task: ClassVar[str] = "neighbours"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"embeddings"}),)
    remedy: ClassVar[str] = SPACE
    scores: Annotated[Uri, OPERATIONAL]
    """The other dataset's scores with task embed, by the same model: their directory or URI."""
    of: Side = "pictures"
    """What is compared with the picture: the other dataset's pictures, or its captions."""
    top: int = Field(5, ge=1)
    """How many are kept, the nearest first."""

    @cached_property
    def others(self) -> Scores:
        """The scores as they were when first asked for. Workers are sent them, so that all search the same."""
        return open_scores(self.scores)

    def identity(self) -> dict[str, Any]:
        """With the fingerprint of the scores in place of their path."""
        return {**super().identity(), "scores": self.others.fingerprint}

    def check(self, digest: str) -> None:
        """Raise MisuseError for scores of another model than this one, or without embeddings; MissingArtifactError if
        there are none."""
        if self.others.digest != digest:
            raise MisuseError(
                f"{self.others.uri} is by model {self.others.digest[:12]}, not by this one ({digest[:12]}): their "
                "vectors cannot be compared; score that dataset with this model first"
            )
        self.others.width(self.of)

    @property
    def reads(self) -> tuple[Result, ...]:
        """Stored embeddings, where there are any."""
        return (ImageEmbeddings(),)

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """Lists of the same length, the nearest first."""
        kind = self.of[:-1]
        return [
            column("neighbour_keys", pa.list_(pa.string()), f"keys of the samples with the nearest {self.of}"),
            column("neighbour_datasets", pa.list_(pa.string()), "their datasets, as the other scores name them"),
            column("neighbour_shards", pa.list_(pa.string()), "their shards"),
            column("neighbour_rows", pa.list_(pa.int32()), "their rows in the shards"),
            column("neighbour_similarity", pa.list_(pa.float32()), f"cosines of this picture and each {kind}"),
        ]

    def start(self, predictor: Predictor) -> Mapped:
        """The other embeddings, mapped from this node's disk."""
        return mapped(self.others, self.of)

    def run(self, batch: Batch, started: Mapped) -> Columns:
        """Cosines with every other embedding, a tile at a time."""
        from mmflow.learning.nearest import nearest_in_tiles

        pictures_BW = batch.stored_image_embeddings[:, : started.width]
        pictures_BW = pictures_BW / np.linalg.norm(pictures_BW, axis=1, keepdims=True)
        device = batch.predictor.device
        places_BK, cosines_BK = nearest_in_tiles(pictures_BW, started.blocks, self.top, device=device)
        found = started.rows.take(places_BK.ravel())
        values = {f"neighbour_{name}s": found[name].combine_chunks() for name in ("key", "dataset", "shard", "row")}
        values["neighbour_similarity"] = pa.array(cosines_BK.ravel())
        ends = np.arange(len(places_BK) + 1, dtype=np.int32) * places_BK.shape[1]
        return {name: pa.ListArray.from_arrays(ends, array) for name, array in values.items()}
