"""What the loader reads: batches, windows, augmentation and tokens."""

from __future__ import annotations

from pydantic import Field

from mmflow.config import Config


class AugmentConfig(Config):
    """Random views for training, a pure function of (seed, epoch, sample): any batch can be rebuilt anywhere."""

    max_zoom: float = Field(1.0, ge=1)
    """A view is enlarged or shrunk by a factor of up to this; what lies outside the picture is white."""
    max_aspect: float = Field(1.0, ge=1)
    """Width against height is changed by a factor of up to this."""
    max_shift: float = Field(0.0, ge=0, lt=0.5)
    """Most that a view's centre moves, as a share of the picture's side."""
    max_rotation_degrees: float = Field(0.0, ge=0, le=180)
    """Most that a view is turned, either way."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal mirror."""
    brightness: float = Field(0.0, ge=0, lt=1)
    """Brightness is multiplied by a factor within 1 ± this."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Contrast is multiplied by a factor within 1 ± this."""
    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a word piece is left out of the caption."""


class LoaderConfig(Config):
    """Dataset to batches."""

    split: str = "train"
    """The dataset's split that is trained on."""
    window: int = Field(16_384, ge=1)
    """Samples are shuffled within windows of this many, so that reads stay close together."""
    language_weights: dict[str, float] = Field(default_factory=dict)
    """Relative frequency at which each language's captions are drawn; a language not named weighs 1."""
    augment: AugmentConfig = AugmentConfig()
    prefetch_batches: int = Field(3, ge=1)
    """Batches a rank prepares ahead of the step that consumes them."""
