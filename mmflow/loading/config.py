"""Loader settings: sample order, mixtures, augmentation, texts, and how batches are prepared."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmflow.core.config import OPERATIONAL, Config, Uri
from mmflow.dataset.config import ShardCacheConfig


class CropConfig(Config):
    """A random part of the picture, resized to the view: Inception's crop (Szegedy et al., 1409.4842 §6)."""

    area: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the picture's area. Captions that describe the whole picture need most of it."""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest ratio of width to height."""

    @model_validator(mode="after")
    def _ordered(self) -> CropConfig:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area {list(self.area)} is not a range within (0, 1]; write for instance [0.5, 1]")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect {list(self.aspect)} is not a range above 0; write for instance [0.75, 1.33]")
        return self


Operation = Literal[
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "contrast", "colour",
    "sharpness", "posterise", "solarise", "autocontrast", "equalise"
]  # fmt: skip


class PoliciesConfig(Config):
    """RandAugment (Cubuk et al., 1909.13719): a few random operations, all of the same strength."""

    count: int = Field(2, ge=1, le=8)
    """Operations per view, drawn with replacement."""
    strength: float = Field(0.5, ge=0, le=1)
    """Share of each operation's range. The paper's magnitude of 10 out of 30 is 1/3."""
    operations: list[Operation] = Field(
        default=["identity", "autocontrast", "brightness", "sharpness", "equalise", "shear_x", "shear_y", "translate_x",
                 "translate_y", "rotate"],
        min_length=1,
    )  # fmt: skip
    """Operations to draw from. The default is ALBEF's ten (2107.07651, implementation details): captions name colours,
    so operations made to change colours are left out. Contrast, colour, posterise and solarise are the paper's other
    four.
    """


class AugmentConfig(Config):
    """Random views for training. A view depends only on (seed, epoch, key), so any batch can be rebuilt anywhere."""

    crop: CropConfig | None = None
    """A random part of the picture. None: the largest centred square."""
    max_zoom: float = Field(1.0, ge=1)
    """A view is scaled up or down by a factor of up to this. What lies outside the picture is white."""
    max_aspect: float = Field(1.0, ge=1)
    """The ratio of width to height changes by a factor of up to this."""
    max_shift: float = Field(0.0, ge=0, lt=0.5)
    """Largest shift of a view's centre, as a share of the view's side."""
    max_rotation_degrees: float = Field(0.0, ge=0, le=180)
    """Largest rotation of a view, either way."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal mirror. Use 0 when captions say left and right."""
    brightness: float = Field(0.0, ge=0, lt=1)
    """Brightness is multiplied by a factor within 1 ± this."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Contrast is multiplied by a factor within 1 ± this."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Saturation is multiplied by a factor within 1 ± this."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Largest turn of hues, either way, as a share of the colour circle."""
    policies: PoliciesConfig | None = None
    """RandAugment's operations, after all of the above."""
    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a word piece is left out of the caption."""


class MixedDatasetConfig(Config):
    """One dataset of a mixture besides the stage's own."""

    uri: Annotated[Uri, OPERATIONAL]
    """A committed dataset: a path, s3:// or gs://."""
    split: str = "train"
    """The split to train on."""


class CurriculumConfig(Config):
    """Mixture weights from a step on."""

    step: int = Field(ge=0)
    """The first step with these weights."""
    weights: list[float]
    """One per dataset, the stage's own first."""


class MixtureConfig(Config):
    """Several datasets in every batch, each with its own position."""

    datasets: list[MixedDatasetConfig] = Field(min_length=1)
    """The datasets besides the stage's own, which comes first wherever weights are listed."""
    weighting: Literal["proportional", "temperature", "fixed"] = "proportional"
    """proportional: by samples; temperature: by samples to the power of 1/temperature; fixed: by `weights`."""
    temperature: float = Field(1.0, gt=0)
    """Above 1, small datasets are drawn more often than their size."""
    weights: list[float] = Field(default_factory=list)
    """One per dataset, the stage's own first; for weighting: fixed."""
    curriculum: list[CurriculumConfig] = Field(default_factory=list)
    """Weights that replace the others from given steps on. They change at once, without interpolation."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        if (self.weighting == "fixed") != bool(self.weights):
            raise ValueError(f"weights go with weighting: fixed, but it is {self.weighting}; set both or neither")
        if self.weighting != "temperature" and self.temperature != 1:
            raise ValueError(f"temperature goes with weighting: temperature, but it is {self.weighting}; remove it")
        steps = [change.step for change in self.curriculum]
        if steps != sorted(set(steps)):
            raise ValueError(f"curriculum: steps must increase, got {steps}")
        num_datasets = 1 + len(self.datasets)
        for weights in ([self.weights] if self.weights else []) + [change.weights for change in self.curriculum]:
            if len(weights) != num_datasets:
                raise ValueError(f"weights: got {len(weights)} for {num_datasets} datasets, counting the stage's own")
            if min(weights) < 0 or not 0 < sum(weights) < math.inf:
                raise ValueError(f"weights must be at least 0 and one must be above 0, got {weights}")
        return self


class WorkersConfig(Config):
    """What loads rows in parallel with the training step. The batches are the same for every choice."""

    kind: Literal["threads", "processes"] | None = None
    """Threads start at once but share the interpreter's lock. Processes take seconds to start. None: threads for up to
    four workers, processes for more.
    """
    count: int | None = Field(None, ge=1)
    """Workers per rank. None: one per CPU core that the rank reserves."""


class LoaderConfig(Config):
    """Dataset to batches."""

    split: str = "train"
    """The dataset's split to train on."""
    window: int = Field(4_096, ge=1)
    """Samples of a lane are shuffled within windows of this many, so that reads stay close together."""
    lanes: int = Field(16, ge=1)
    """An epoch is read at this many places at once; ranks share them out."""
    mixture: MixtureConfig | None = None
    """Other datasets to draw from besides the stage's own."""
    cache: Annotated[ShardCacheConfig, OPERATIONAL] = ShardCacheConfig()
    language_weights: dict[str, float] = Field(default_factory=dict)
    """Relative frequency of each language's captions. A language that is not listed has weight 1."""
    augment: AugmentConfig = AugmentConfig()
    frames: int = Field(0, ge=0)
    """Frames per clip, evenly spread with a random jitter. 0: the still image, which is a clip's first frame."""
    text: Literal["captions", "questions"] = "captions"
    """What the text side reads: one of a sample's captions, or one of its metadata's questions with the answer as the
    target.
    """
    label: str | None = None
    """Name of the class in the metadata that is a target, such as `group`."""
    truncation: Literal["head", "sentences"] = "head"
    """What is kept of a text that is too long: its beginning, or a random run of whole sentences."""
    bucket_batches: int = Field(1, ge=1)
    """Groups of this many batches share out their samples by length, which saves padding. 1: no sorting by length."""
    on_corrupt: Annotated[Literal["stop", "skip"], OPERATIONAL] = "stop"
    """A sample that is damaged or cannot be decoded: stop training, or skip it and report it."""
    max_skipped: Annotated[int, OPERATIONAL] = Field(100, ge=0)
    """Samples that a rank may skip since its start, with on_corrupt: skip, before training stops."""
    prefetch_batches: Annotated[int, OPERATIONAL] = Field(3, ge=1)
    """Batches that a rank prepares ahead of the training step."""
    workers: Annotated[WorkersConfig, OPERATIONAL] = WorkersConfig()

    @model_validator(mode="after")
    def _consistent(self) -> LoaderConfig:
        if self.text == "questions" and self.label is not None:
            raise ValueError("label: the targets of questions are their answers; remove label, or use text: captions")
        if any(not 0 <= weight < math.inf for weight in self.language_weights.values()):
            raise ValueError(f"language_weights: weights must be finite and at least 0, got {self.language_weights}")
        return self
