"""What a model is examined in."""

from __future__ import annotations

from pydantic import Field

from mmflow.config import Config


class ZeroShotConfig(Config):
    """Classes told apart by their names alone."""

    label: str
    """Field of a sample's `classes` that holds the right class."""
    prompts: dict[str, list[str]] = Field(min_length=2)
    """Class → texts that describe it; their embeddings are averaged. Samples of other classes are left out."""


class EvaluateConfig(Config):
    """Stage `evaluate`: teacher, student and an untrained model on the same held-out rows."""

    splits: list[str] = Field(min_length=1)
    """Held-out splits, each reported by its name."""
    languages: list[str] = Field(default_factory=lambda: ["en"], min_length=1)
    """Languages of the captions; the first is the one that headline figures and gates use."""
    zero_shot: ZeroShotConfig | None = None
    batch_size: int = Field(256, ge=1)
    """Rows embedded at a time."""
