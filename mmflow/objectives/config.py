"""What each objective can be told."""

from __future__ import annotations

from pydantic import Field

from mmflow.config import Config


class ContrastiveConfig(Config):
    """The contrastive objective (InfoNCE over the global batch)."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over all candidates."""
