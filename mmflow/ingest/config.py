"""What ingest reads: where records come from, and what a sample's image and captions must be like."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmflow.config import Config


class SourceConfig(Config):
    """One place that records come from."""

    kind: Literal["jsonl"] = "jsonl"
    """jsonl: a line a record, {"key", "image", "captions": [{"language", "text"}], "split"}; the rest is metadata."""
    uri: str
    """A path, s3:// or gs://. Image paths within are relative to it."""


class ImageConfig(Config):
    """The bounds that a source image must meet, and how it is stored."""

    side: int = Field(256, ge=8, le=4096)
    """Shortest side in pixels after resizing; a smaller image is never enlarged."""
    max_pixels: int = Field(80_000_000, ge=1, le=178_956_970)
    """Most pixels of a source image, read from its header before any is decoded. Pillow refuses more than the bound."""
    min_side: int = Field(16, ge=1)
    """Least shortest side of a source image, in pixels."""
    max_aspect: float = Field(8.0, ge=1)
    """Most that the longer side may be of the shorter."""
    format: Literal["jpeg", "webp"] = "jpeg"
    """What images are stored as."""
    quality: int = Field(90, ge=1, le=100)
    """The encoder's quality; a JPEG of 90 and above keeps colour at full resolution."""


class CaptionConfig(Config):
    """The bounds that a caption must meet once cleaned; a record without any left is rejected."""

    min_characters: int = Field(2, ge=1)
    """Shorter captions are dropped."""
    max_characters: int = Field(20_000, ge=1)
    """Longer captions are dropped."""


class CorpusConfig(Config):
    """A demonstration corpus, drawn from installed packages."""

    name: Literal["openmoji"] = "openmoji"
    """openmoji: 4,495 drawings, 3,953 of them with an English and a Chinese name."""
    image_pixels: int = Field(128, ge=16, le=1024)
    """Side of the drawings."""
    unseen_concept_share: float = Field(0.1, ge=0, lt=1)
    """Share of concepts held out whole: split `unseen_concepts`."""
    unseen_variant_share: float = Field(0.1, ge=0, lt=1)
    """Share of the other drawings held out while a variant of them stays: split `unseen_variants`."""
    seed: int = 0
    """Which ones are held out."""
