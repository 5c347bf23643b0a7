"""What the shard stage reads."""

from __future__ import annotations

from pydantic import Field

from mmflow.config import Config
from mmflow.ingest.config import CaptionConfig, ImageConfig, SourceConfig


class ShardConfig(Config):
    """Records to a dataset."""

    sources: list[SourceConfig] = Field(default_factory=list)
    """Where records come from; the first of two records with one key is the one kept."""
    image: ImageConfig = ImageConfig()
    """Bounds and storage of images."""
    captions: CaptionConfig = CaptionConfig()
    """Bounds of captions."""
    samples_per_shard: int = Field(10_000, ge=1)
    """Records a shard on average: a shard is an equal range of the keys' hashes, so its size varies by its root."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the global shuffle."""
