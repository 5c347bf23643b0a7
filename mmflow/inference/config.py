"""Settings of what is asked of a model about a dataset's samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmflow.core.config import OPERATIONAL, Config


class WritingConfig(Config):
    """How a decoder's text is searched for."""

    search: Literal["greedy", "beam", "nucleus"] = "beam"
    """The likeliest token at each step; the likeliest text among several; or tokens drawn from the likeliest."""
    beams: int = Field(4, ge=1)
    """Texts that a beam search follows at once."""
    length_penalty: float = Field(1.0, ge=0)
    """A beam's log-probability is divided by its length to this power: above 0 favours longer text."""
    nucleus: float = Field(0.9, gt=0, le=1)
    """Tokens are drawn from the fewest that have this share of the probability."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of a text at most; None: as many as the model takes."""


class ScoreConfig(Config):
    """Stage `score`: the champion's embeddings, best class and image–caption similarity for every row."""

    num_workers: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """Actors that hold the model."""
    cpus_per_worker: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """CPU cores each reserves."""
    batch_size: Annotated[int, OPERATIONAL] = Field(256, ge=1)
    """Rows embedded at a time."""
