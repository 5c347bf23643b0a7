"""What a model is examined in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mmflow.core.config import OPERATIONAL, Config
from mmflow.inference.config import WritingConfig


class ZeroShotConfig(Config):
    """Classes told apart by their names alone."""

    label: str
    """Field of a sample's `classes` that holds the right class."""
    prompts: dict[str, list[str]] = Field(min_length=2)
    """Class → texts that describe it; their embeddings are averaged. Samples of other classes are left out."""
    templates: list[str] = Field(default_factory=lambda: ["{}"], min_length=1)
    """Sentences that each of these texts is put into in place of {}, such as "a photo of a {}"; their embeddings are
    averaged too."""

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the text to stand in")
        return templates

    @property
    def texts(self) -> dict[str, list[str]]:
        """Class → every one of its texts in every template."""
        return {
            name: [template.replace("{}", text) for template in self.templates for text in texts]
            for name, texts in self.prompts.items()
        }


class ClassificationConfig(Config):
    """The classes that the model's head `classes` tells apart."""

    label: str
    """Field of a sample's `classes` that holds the right class; the one that the model was trained on."""


class AnsweringConfig(WritingConfig):
    """Questions about pictures (`questions` in a sample's metadata): by the head `classes` over known answers where the
    model has one, or written by its decoder, as the settings say."""

    search: Literal["greedy", "beam", "nucleus"] = "greedy"
    """The likeliest token at each step; the likeliest text among several; or tokens drawn from the likeliest."""


class MaskedWordsConfig(Config):
    """Words of captions hidden one at a time and guessed by the head `masked_language`. It has no settings."""


class LongTextConfig(Config):
    """Retrieval by whole captions against retrieval by their beginnings, by the same model."""

    truncated_tokens: int = Field(77, ge=4)
    """Tokens that the beginning keeps; 77 is what CLIP reads."""


class MatchingConfig(Config):
    """Retrieval by the head `matching`, which reads picture and caption together."""

    candidates: int = Field(16, ge=1)
    """The nearest this many by the embeddings are put in order again; a model without embeddings reads every pair."""


class AttentionConfig(Config):
    """Pictures and captions shown with what the model looked at when it compared them."""

    rows: int = Field(6, ge=1)
    """Of the first split, spread evenly over it."""


class EvaluateConfig(Config):
    """Stage `evaluate`: teacher, student and an untrained model on the same held-out rows, retrieval wherever the model
    has a shared space."""

    splits: list[str] = Field(min_length=1)
    """Held-out splits, each reported by its name."""
    languages: list[str] = Field(default_factory=lambda: ["en"], min_length=1)
    """Languages of the captions; the first is the one that headline figures and gates use."""
    zero_shot: ZeroShotConfig | None = None
    classification: ClassificationConfig | None = None
    answering: AnsweringConfig | None = None
    captions: WritingConfig | None = None
    """Captions written by the decoder against people's, and how much theirs surprise it."""
    long_text: LongTextConfig | None = None
    matching: MatchingConfig | None = None
    masked_language: MaskedWordsConfig | None = None
    attention: AttentionConfig | None = None
    batch_size: Annotated[int, OPERATIONAL] = Field(256, ge=1)
    """Rows embedded at a time."""
