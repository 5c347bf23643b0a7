"""Bounds of source images, and how they are stored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmflow.core.config import Config


class ImageConfig(Config):
    """The bounds that a source image must meet, and how it is stored."""

    side: int = Field(256, ge=8, le=4096)
    """Pixels that `resize` aims at; a smaller image is never enlarged."""
    resize: Literal["none", "shortest", "longest", "crop"] = "shortest"
    """shortest, longest: that side becomes `side`; crop: the middle square of `side`; none: as it is."""
    max_pixels: int = Field(80_000_000, ge=1, le=178_956_970)
    """Most pixels of a source image, read from its header before any is decoded. Pillow refuses more than the bound."""
    min_side: int = Field(16, ge=1)
    """Least shortest side of a source image, in pixels."""
    max_aspect: float = Field(8.0, ge=1)
    """Most that the longer side may be of the shorter."""
    background: tuple[int, int, int] = (255, 255, 255)
    """What shows through transparent pixels, RGB."""
    format: Literal["jpeg", "webp"] = "jpeg"
    """What images are stored as."""
    quality: int = Field(90, ge=1, le=100)
    """The encoder's quality; a JPEG of 90 and above keeps colour at full resolution."""
    keep_conforming: bool = True
    """Store a file's own bytes where they are of the format already, upright, in RGB and of the size asked."""
    max_frames: int = Field(16, ge=1)
    """Most frames kept of an animated image or a frame folder, evenly spaced; 1 keeps the first alone."""
