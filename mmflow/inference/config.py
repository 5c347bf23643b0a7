"""How a dataset is scored."""

from __future__ import annotations

from pydantic import Field

from mmflow.core.config import Config


class ScoreConfig(Config):
    """Stage `score`: the champion's embeddings, best class and image–caption similarity for every row."""

    num_workers: int = Field(1, ge=1)
    """Actors that hold the model."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores each reserves."""
    batch_size: int = Field(256, ge=1)
    """Rows embedded at a time."""
