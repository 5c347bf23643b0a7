"""Settings of the shard stage, and of the cache of remote shards."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from mmflow.cleaning.config import CaptionConfig, DuplicatesConfig, ImageConfig
from mmflow.core.config import Config, Uri
from mmflow.fetch.config import FetchConfig
from mmflow.sources.config import SourceConfig

SPLIT = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


class ShardConfig(Config):
    """Records to a dataset."""

    sources: list[SourceConfig] = Field(default_factory=list)
    """Where records come from; the first of two records with one key is the one kept."""
    fetch: FetchConfig = FetchConfig()
    """How images that are URLs are fetched."""
    image: ImageConfig = ImageConfig()
    """Bounds and storage of images."""
    captions: CaptionConfig = CaptionConfig()
    """Bounds of captions."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Which records are too alike."""
    splits: dict[str, float] = Field(default_factory=dict)
    """Split → share of the records that name none, chosen by a hash: {validation: 0.01}. The rest is `train`."""

    @field_validator("splits")
    @classmethod
    def _shares(cls, splits: dict[str, float]) -> dict[str, float]:
        for name, share in splits.items():
            if not SPLIT.fullmatch(name):
                raise ValueError(f"{name!r}: a split's name has lower-case letters, digits, - and _, at most 40")
            if not 0 < share < 1:
                raise ValueError(f"{name}: {share}; a share lies between 0 and 1")
        if sum(splits.values()) >= 1:
            raise ValueError(f"the shares sum to {sum(splits.values()):g}, and nothing is left to train on")
        return splits

    group_by: str | None = None
    """Key of the metadata whose equals stay in one split, such as a page or a product. None: each record by itself."""
    samples_per_shard: int = Field(10_000, ge=1)
    """Samples a shard on average: a shard is an equal range of the keys' hashes, so its size varies by its root."""
    bytes_per_shard: int = Field(1 << 30, ge=1)
    """Bytes a shard on average, where that is less than its samples would have."""
    grow: bool = True
    """Keep the shards of a dataset of these settings whose sources are all still there, and add those of new ones."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the global shuffle."""


class ShardCacheConfig(Config):
    """Where a node keeps the shards of a remote dataset. A local dataset is read where it lies."""

    directory: Uri | None = None
    """A local directory that all processes of the node share; None: mmflow/shards under the user's cache directory."""
    max_bytes: int = Field(100_000_000_000, ge=1)
    """Beyond this many bytes, the least recently read shards are deleted. Allow for two shards a lane at least."""
