"""Settings of cleaning: images, captions, and which records are too alike."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmflow.core.config import OPERATIONAL, Config


class ImageConfig(Config):
    """The bounds of a source image, and how it is stored."""

    side: int = Field(256, ge=8, le=4096)
    """Pixels, see `resize`. A smaller image is never enlarged."""
    resize: Literal["none", "shortest", "longest", "crop"] = "shortest"
    """shortest, longest: that side becomes `side`; crop: the middle square of `side`; none: as it is."""
    max_pixels: int = Field(80_000_000, ge=1, le=178_956_970)
    """Most pixels of a source image, read from its header before any is decoded. The upper bound is Pillow's own."""
    min_side: int = Field(16, ge=1)
    """Least shortest side of a source image, in pixels."""
    max_aspect: float = Field(8.0, ge=1)
    """Most that the longer side may measure, in multiples of the shorter."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB that shows through transparent pixels."""
    format: Literal["jpeg", "webp"] = "jpeg"
    """The format of stored images."""
    quality: int = Field(90, ge=1, le=100)
    """The encoder's quality; a JPEG of 90 and above keeps colour at full resolution."""
    keep_conforming: bool = True
    """Store a file's own bytes if they already have the format, size and orientation asked, in RGB."""
    max_frames: int = Field(16, ge=1)
    """Most frames kept of an animated image or a frame folder, evenly spaced; 1 keeps the first alone."""


class CaptionConfig(Config):
    """The bounds of a cleaned caption."""

    required: bool = True
    """Reject records that have no caption left; false if a class or questions replace captions."""
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
    """Languages to keep, including "und" to keep unknown ones; others are dropped. Empty: all."""
    max_images: int | None = Field(None, ge=1)
    """A caption of more images than this is dropped from all of them."""


class DuplicatesConfig(Config):
    """Which records are too alike. One of each group stays: held-out splits before train, then the first."""

    exact: bool = True
    """Images with the same pixels once resized."""
    radius: int | None = Field(None, ge=0, le=12)
    """Images with 64-bit perceptual hashes that differ in at most this many bits. 3 is careful, 8 is bold."""
    caption_similarity: float | None = Field(None, gt=0, le=1)
    """Records with first captions of at least this Jaccard similarity, on 3-grams of words, by MinHash."""
    against: Annotated[list[str], OPERATIONAL] = Field(default_factory=list)  # their fingerprints are inputs
    """Evaluation datasets: records that are like one of their samples are not trained on."""
