"""What the loader reads: order, mixture, cache, augmentation, text, and how batches are prepared."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmflow.core.config import OPERATIONAL, Config, Uri
from mmflow.dataset.config import ShardCacheConfig


class CropConfig(Config):
    """A random part of the picture, enlarged or shrunk to the view: Inception's crop (Szegedy et al., 1409.4842 §6)."""

    area: tuple[float, float] = (0.5, 1.0)
    """Least and most of the picture's area; a caption that says all of the picture wants most of it."""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """Least and most of its width over its height."""

    @model_validator(mode="after")
    def _ordered(self) -> CropConfig:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area {list(self.area)} is no range within (0, 1], such as [0.5, 1]")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect {list(self.aspect)} is no range above 0, such as [0.75, 1.33]")
        return self


Operation = Literal[
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "contrast", "colour",
    "sharpness", "posterise", "solarise", "autocontrast", "equalise"
]  # fmt: skip


class PoliciesConfig(Config):
    """RandAugment (Cubuk et al., 1909.13719): a few operations at random, all of one strength."""

    count: int = Field(2, ge=1, le=8)
    """Operations a view, drawn with replacement."""
    strength: float = Field(0.5, ge=0, le=1)
    """Share of each operation's range; the paper's magnitude of 10 is 1/3 of 30."""
    operations: list[Operation] = Field(
        default=["identity", "autocontrast", "brightness", "sharpness", "equalise", "shear_x", "shear_y", "translate_x",
                 "translate_y", "rotate"],
        min_length=1,
    )  # fmt: skip
    """What is drawn from. These ten are ALBEF's (2107.07651, implementation details), which leaves out those made to
    change colours, because captions name colours; contrast, colour, posterise and solarise are the paper's other four.
    """


class AugmentConfig(Config):
    """Random views for training, a pure function of (seed, epoch, key): any batch can be rebuilt anywhere."""

    crop: CropConfig | None = None
    """A random part of the picture; None: the largest centred square."""
    max_zoom: float = Field(1.0, ge=1)
    """A view is enlarged or shrunk by a factor of up to this; what lies outside the picture is white."""
    max_aspect: float = Field(1.0, ge=1)
    """Width against height is changed by a factor of up to this."""
    max_shift: float = Field(0.0, ge=0, lt=0.5)
    """Most that a view's centre moves, as a share of the view's side."""
    max_rotation_degrees: float = Field(0.0, ge=0, le=180)
    """Most that a view is turned, either way."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal mirror; captions that say left and right want 0."""
    brightness: float = Field(0.0, ge=0, lt=1)
    """Brightness is multiplied by a factor within 1 ± this."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Contrast is multiplied by a factor within 1 ± this."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Saturation is multiplied by a factor within 1 ± this."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Most that hues turn, either way, as a share of the colour circle."""
    policies: PoliciesConfig | None = None
    """RandAugment's operations after all of these."""
    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a word piece is left out of the caption."""


class MixedDatasetConfig(Config):
    """One dataset of a mixture beside the stage's own."""

    uri: Annotated[Uri, OPERATIONAL]
    """A committed dataset: a path, s3:// or gs://."""
    split: str = "train"
    """The split of it that is trained on."""


class CurriculumConfig(Config):
    """Weights of a mixture from a step on."""

    step: int = Field(ge=0)
    """The first step at which they hold."""
    weights: list[float]
    """One a dataset, the stage's own first."""


class MixtureConfig(Config):
    """Several datasets in every batch, each with a cursor of its own."""

    datasets: list[MixedDatasetConfig] = Field(min_length=1)
    """Those beside the stage's own dataset, which comes first wherever weights are listed."""
    weighting: Literal["proportional", "temperature", "fixed"] = "proportional"
    """proportional: by samples; temperature: by samples to the power of 1/temperature; fixed: by `weights`."""
    temperature: float = Field(1.0, gt=0)
    """Above 1 small datasets are drawn more often than their size."""
    weights: list[float] = Field(default_factory=list)
    """One a dataset, the stage's own first; for weighting: fixed."""
    curriculum: list[CurriculumConfig] = Field(default_factory=list)
    """Weights that replace the others from given steps on, at once: nothing is interpolated."""

    @model_validator(mode="after")
    def _weighed(self) -> MixtureConfig:
        if (self.weighting == "fixed") != bool(self.weights):
            raise ValueError(f"weights belong to weighting: fixed, this is {self.weighting}; give both or neither")
        if self.weighting != "temperature" and self.temperature != 1:
            raise ValueError(f"temperature belongs to weighting: temperature, this is {self.weighting}; leave it out")
        steps = [change.step for change in self.curriculum]
        if steps != sorted(set(steps)):
            raise ValueError(f"curriculum: its steps must rise, these are {steps}")
        listed = [self.weights] if self.weights else []
        for weights in (*listed, *(change.weights for change in self.curriculum)):
            if len(weights) != 1 + len(self.datasets):
                raise ValueError(
                    f"weights: {len(weights)} of them for {1 + len(self.datasets)} datasets, the stage's own first"
                )
            if min(weights) < 0 or not 0 < sum(weights) < math.inf:
                raise ValueError(f"weights are numbers from 0 on, one of them above; these are {weights}")
        return self


class WorkersConfig(Config):
    """Who decodes, beside the step that consumes. Batches are bit-equal whatever is chosen here."""

    kind: Literal["threads", "processes"] | None = None
    """Threads start at once; processes take seconds, and then wait for no turn at the interpreter's lock. None: threads
    up to four, processes where there are more.
    """
    count: int | None = Field(None, ge=1)
    """How many a rank has; None: as many as it reserves CPU cores."""


class LoaderConfig(Config):
    """Dataset to batches."""

    split: str = "train"
    """The dataset's split that is trained on."""
    window: int = Field(4_096, ge=1)
    """Samples of a lane are shuffled within windows of this many, so that reads stay close together."""
    lanes: int = Field(16, ge=1)
    """An epoch's line of shards is read at this many places at once; ranks share them out."""
    mixture: MixtureConfig | None = None
    """Other datasets to draw from beside the stage's own."""
    cache: Annotated[ShardCacheConfig, OPERATIONAL] = ShardCacheConfig()
    language_weights: dict[str, float] = Field(default_factory=dict)
    """Relative frequency at which each language's captions are drawn; a language not named weighs 1."""
    augment: AugmentConfig = AugmentConfig()
    frames: int = Field(0, ge=0)
    """Frames of a clip, evenly spread with a random jitter; 0: the still, which is a clip's first frame."""
    text: Literal["captions", "questions"] = "captions"
    """What the text side reads: one of a sample's captions, or of its metadata's questions, whose answer is the target.
    """
    label: str | None = None
    """Name of the metadata's class that is a target, such as `group`."""
    truncation: Literal["head", "sentences"] = "head"
    """What is kept of a longer text: its beginning, or a random run of whole sentences."""
    bucket_batches: int = Field(1, ge=1)
    """The samples of this many batches are dealt to them by length, which saves padding; 1: as they come."""
    on_corrupt: Annotated[Literal["stop", "skip"], OPERATIONAL] = "stop"
    """A sample that is not what was written, or cannot be decoded: end the training, or leave it out and say so."""
    max_skipped: Annotated[int, OPERATIONAL] = Field(100, ge=0)
    """Samples that a rank may leave out from its start on, under on_corrupt: skip, before the training ends."""
    prefetch_batches: Annotated[int, OPERATIONAL] = Field(3, ge=1)
    """Batches a rank prepares ahead of the step that consumes them."""
    workers: Annotated[WorkersConfig, OPERATIONAL] = WorkersConfig()

    @model_validator(mode="after")
    def _one_target(self) -> LoaderConfig:
        if self.text == "questions" and self.label is not None:
            raise ValueError("label: the targets of questions are their answers; leave label out, or read captions")
        if any(not 0 <= weight < math.inf for weight in self.language_weights.values()):
            raise ValueError(f"language_weights: {self.language_weights} has a weight that is no number from 0 on")
        return self
