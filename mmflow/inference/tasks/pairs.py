"""Pairs of pictures and given texts, for evaluation: by the head that reads both together, or by a model that scores
pair by pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa

from mmflow.core.artifacts import content_hash
from mmflow.core.config import OPERATIONAL
from mmflow.inference.result import Columns, Gives, Result, column, lists_of
from mmflow.inference.tasks.match import match_odds

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch, Predictor
    from mmflow.models.package import LoadedModel

PAIRS_AT_ONCE = 4096  # of a caption and 12 frames, 512 wide: a tenth of a gigabyte a layer


class GivenMatches(Result):
    """The odds that given texts belong to a picture, each row with its own texts."""

    task: ClassVar[str] = "given_matches"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"matching_logits"}),)
    remedy: ClassVar[str] = "a fusion and the head matching"
    texts: Annotated[dict[str, list[list[str]]], OPERATIONAL]
    """Shard → the texts of each of its rows."""
    digest: str
    """Their hash, which stands for them in the identity."""

    @classmethod
    def of(cls, texts: dict[str, list[list[str]]]) -> GivenMatches:
        """With the digest of the texts."""
        return cls(texts=texts, digest=content_hash(texts))

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """A list of numbers."""
        return [column("given_matches", pa.list_(pa.float32()), "log-odds that each given text belongs to the picture")]

    def run(self, batch: Batch, started: Any) -> Columns:
        """All pairs of the batch."""
        own = [self.texts[batch.shard][row] for row in batch.rows]
        texts, lengths = [text for theirs in own for text in theirs], list(map(len, own))
        odds = match_odds(batch, np.repeat(np.arange(len(own)), lengths), texts)
        return {"given_matches": lists_of(pa.array(odds, pa.float32()), lengths)}


class PairScores(Result):
    """The scores of a picture with all given texts, by a model that compares pair by pair."""

    task: ClassVar[str] = "pair_scores"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"pair_scores"}),)
    remedy: ClassVar[str] = "model.video of kind tight"
    texts: Annotated[tuple[str, ...], OPERATIONAL]
    digest: str
    """The hash of the texts, which stands for them in the identity."""
    max_tokens: int | None = None
    """Texts are cut to so many tokens; None: to what the model reads."""

    @classmethod
    def of(cls, texts: tuple[str, ...], max_tokens: int | None = None) -> PairScores:
        """With the digest of the texts."""
        return cls(texts=texts, digest=content_hash(texts), max_tokens=max_tokens)

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """A list of numbers."""
        return [column("pair_scores", pa.list_(pa.float32(), len(self.texts)), "the score with each text")]

    def start(self, predictor: Predictor) -> Any:
        """The texts' pooled vectors (A, width of the encoder)."""
        import torch

        size = predictor.batch_size
        parts = [
            predictor.model.encode_text(
                *predictor.text_inputs(self.texts[first : first + size], self.max_tokens)
            ).pooled_BW
            for first in range(0, len(self.texts), size)
        ]
        return torch.cat(parts)

    def run(self, batch: Batch, started: Any) -> Columns:
        """Some texts with all clips of the batch at a time."""
        import torch

        clips, size = batch.image(), max(1, PAIRS_AT_ONCE // len(batch.samples))
        parts = [
            batch.predictor.model.score_pairs(started[first : first + size], clips)
            for first in range(0, len(started), size)
        ]
        scores_BA = torch.cat(parts).float().cpu().numpy().T
        flat = pa.array(np.ascontiguousarray(scores_BA).ravel())
        return {"pair_scores": pa.FixedSizeListArray.from_arrays(flat, len(self.texts))}
