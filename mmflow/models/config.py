"""What a model is made of: two encoders of `transformers`, and the space they meet in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mmflow.config import Config


class EncoderConfig(Config):
    """One encoder: a model type of `transformers` and what differs from that type's own defaults."""

    type: str
    """`model_type` in transformers: resnet, vit, convnext, bert, …"""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of that type's configuration; a field that the type does not have is an error."""
    pooling: Literal["pooler", "mean", "first"] = "mean"
    """How a sequence becomes one vector: the encoder's own pooler, the mean over tokens, or the first token."""


class ModelConfig(Config):
    """A dual encoder: image and text embedded in one space, compared by cosine."""

    image: EncoderConfig
    text: EncoderConfig
    embedding_width: int = Field(256, ge=1)
    """Width of the shared space."""
    image_pixels: int = Field(64, ge=8)
    """Side of the square picture that the image encoder sees."""
    max_tokens: int = Field(32, ge=4)
    """Tokens of a caption past this many are cut, the closing one kept."""
    vocabulary_size: int = Field(4096, ge=64)
    """Word pieces of the tokenizer that is trained on the dataset's captions; fewer where it has fewer."""
    temperature: float = Field(0.07, gt=0)
    """Where the learned temperature starts: similarities are divided by it."""

    @model_validator(mode="after")
    def _not_set_twice(self) -> ModelConfig:
        for name in ("vocab_size", "image_size"):
            for encoder in (self.image, self.text):
                if name in encoder.options:
                    raise ValueError(f"{name} follows from vocabulary_size and image_pixels; leave it out of options")
        return self
