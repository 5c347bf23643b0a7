"""Settings of the shard stage, and of the cache of remote shards."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from mmflow.cleaning.config import CaptionConfig, DuplicatesConfig, ImageConfig
from mmflow.core.config import OPERATIONAL, Config
from mmflow.fetch.config import FetchConfig
from mmflow.sources.config import SourceConfig

SPLIT = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


class ShardConfig(Config):
    """Records to a dataset."""

    sources: Annotated[list[SourceConfig], OPERATIONAL] = Field(default_factory=list)  # their content is an input
    """Where records come from. Of two records with one key, the first is kept."""
    fetch: Annotated[FetchConfig, OPERATIONAL] = FetchConfig()
    """How images that are URLs are fetched."""
    image: ImageConfig = ImageConfig()
    """Bounds and storage of images."""
    captions: CaptionConfig = CaptionConfig()
    """Bounds of captions."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Which records are too alike."""
    splits: dict[str, float] = Field(default_factory=dict)
    """Split → share of the records that name no split, chosen by a hash: {validation: 0.01}. The rest is `train`."""

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
    """Records with an equal value of this metadata key, such as a page or a product, stay in one split."""
    samples_per_shard: int = Field(10_000, ge=1)
    """Average samples per shard. A shard is an equal range of key hashes, so its size varies by its square root."""
    bytes_per_shard: int = Field(1 << 30, ge=1)
    """Average bytes per shard, if that is less than the samples would need."""
    grow: bool = True
    """Keep the shards of an earlier dataset with these settings, if all its sources still exist, and add new ones."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the global shuffle."""


class ShardCacheConfig(Config):
    """Where a node keeps the shards of a remote dataset. A local dataset is read where it lies."""

    directory: str | None = Field(None, pattern="^[/~]")
    """A local directory that all processes of the node share, absolute or under ~, which is the node's own home. None:
    mmflow/shards under the user's cache directory."""
    max_bytes: int = Field(100_000_000_000, ge=1)
    """Beyond this many bytes, the least recently read shards are deleted. Allow for two shards a lane at least."""
