"""Bounds of captions, and which records are too alike."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmflow.core.config import Config


class CaptionConfig(Config):
    """The bounds that a caption must meet once cleaned."""

    required: bool = True
    """A record without any caption left is rejected; false where a class or questions can stand in for captions."""
    min_characters: int = Field(2, ge=1)
    """Shorter captions are dropped."""
    max_characters: int = Field(20_000, ge=1)
    """Longer captions are dropped."""
    min_tokens: int = Field(0, ge=0)
    """Captions of fewer tokens, by estimate, are dropped."""
    max_tokens: int | None = Field(None, ge=1)
    """Captions of more tokens, by estimate, are dropped."""
    mask: list[Literal["email", "phone"]] = Field(default_factory=list)
    """What is replaced by [email] and [phone]."""
    drop_boilerplate: bool = True
    """Drop captions that are file names, or say no more than "image of"."""
    detect_language: bool = False
    """Tag captions of unknown language by py3langid."""
    languages: list[str] = Field(default_factory=list)
    """Languages kept, "und" for what nobody knows among them or not; others are dropped. Empty: all."""
    max_images: int | None = Field(None, ge=1)
    """A caption of more images than this says nothing of any; it is dropped from all of them."""


class DuplicatesConfig(Config):
    """Which records are too alike; of each group one stays, held-out splits before train, then the first."""

    exact: bool = True
    """Images of the same pixels, once resized."""
    radius: int | None = Field(None, ge=0, le=12)
    """Images whose 64-bit perceptual hashes differ in at most so many bits. 3 is careful, 8 is bold."""
    caption_similarity: float | None = Field(None, gt=0, le=1)
    """Records whose first captions have at least this Jaccard similarity of words' 3-grams, by MinHash."""
    against: list[str] = Field(default_factory=list)
    """Datasets that are evaluated on: what is like a sample of theirs is not trained on."""
