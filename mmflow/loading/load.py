"""Slots of a batch to what fills them: samples read, viewed and tokenised. What a worker does, whichever kind it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.errors import CorruptArtifactError, CorruptShardError, RecipeError
from mmflow.dataset.reader import Reader, Sample
from mmflow.loading.config import AugmentConfig
from mmflow.loading.frames import choose_frames
from mmflow.loading.plan import Slots
from mmflow.loading.text import choose_answer, choose_caption, choose_question, drop_tokens, label_of
from mmflow.loading.tokens import tokenise
from mmflow.loading.transforms import generator, random_views

# Shapes: N slots, F frames of a clip (1 for stills), S the side of a picture in pixels.

BLANK = 128  # where there is no picture: mid grey, the same whatever else is in the batch


@dataclass(frozen=True)
class Reading:
    """How a model reads the texts of a batch."""

    tokenizer: Tokenizer
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What makes a view of a sample, beside its key and its epoch."""

    seed: int
    image_pixels: int
    max_tokens: int
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    language_weights: Mapping[str, float] = field(default_factory=dict)
    frames: int = 0  # of a clip; 0: the still
    text: Literal["captions", "questions"] = "captions"
    reads_text: bool = True  # whether the model does; one of pictures alone takes samples without a caption
    truncation: Literal["head", "sentences"] = "head"
    label: str | None = None
    classes: tuple[str, ...] = ()  # the labels, or the answers where the text is questions
    on_corrupt: Literal["stop", "skip"] = "stop"
    stored_views: int = 0  # epoch e shows view e modulo this, of which something is stored; 0: a new one every epoch
    readings: tuple[Reading, ...] = ()  # of other models, from whose tokens none is dropped

    @cached_property
    def class_numbers(self) -> dict[str, int]:
        """Class → its number."""
        return {name: number for number, name in enumerate(self.classes)}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What fills n slots, but for their pixels. Each list has n entries, `skipped` one for each that was left out."""

    keys: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    real: list[bool] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # that a clip really has
    targets: dict[str, list[int]] = field(default_factory=dict)
    answers: list[list[int]] | None = None  # as tokens, [] where there is none
    scores: list[Mapping[int, float]] = field(default_factory=list)  # of the answers that are classes
    skipped: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int, int]] = field(default_factory=list)  # dataset, shard, row, view
    readings: list[list[list[int]]] = field(default_factory=list)  # tokens, of each further reading


@dataclass(frozen=True)
class _Words:
    text: str = ""
    answer: str | None = None
    targets: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[int, float] = field(default_factory=dict)  # class → what it earns as the answer


def load_slots(
    readers: Sequence[Reader],
    tokenizer: Tokenizer,
    settings: ViewSettings,
    slots: Slots,
    pixels_NFSS3: NDArray[np.uint8],
) -> Loaded:
    """Fill the pixels of some slots, and give back the rest of them.

    Raises CorruptArtifactError naming shard, row and key for a sample that is not what was written, or no picture,
    unless it is to be skipped: then its slot is no longer real. MissingArtifactError for a shard that is gone, always.
    """
    keys, real, frames, words, skipped = [], [], [], [], []
    epochs = (slots.epoch % settings.stored_views if settings.stored_views else slots.epoch).tolist()
    places = list(zip(slots.dataset.tolist(), slots.shard.tolist(), slots.row.tolist(), epochs, strict=True))
    for number, ((dataset, shard, row, _), is_real) in enumerate(zip(places, slots.real.tolist(), strict=True)):
        reader = readers[dataset]
        try:
            sample = reader.read(shard, row)
            try:
                frames.append(_show(sample, epochs[number], settings, pixels_NFSS3[number]))
            except CorruptArtifactError as error:
                uri = reader.dataset.tar_uri(reader.shards[shard])
                raise CorruptArtifactError(f"{uri}: row {row} ({sample.key}): {error}") from error
        except CorruptArtifactError as error:
            if settings.on_corrupt == "stop" or isinstance(error, CorruptShardError):
                raise
            pixels_NFSS3[number] = BLANK
            keys.append("")
            real.append(False)
            frames.append(0)
            words.append(_Words())
            skipped += [str(error)] if is_real else []  # as padding it was told by the slot that it repeats
            continue
        keys.append(sample.key)
        real.append(is_real)
        words.append(_choose(sample, epochs[number], settings))
    own_reading = Reading(tokenizer, settings.max_tokens)
    names = (["label"] if settings.label else []) + (["answer"] if settings.text == "questions" else [])
    return Loaded(
        keys=keys,
        tokens=_drop(_tokenise(own_reading, keys, epochs, words, settings), keys, epochs, settings),
        real=real,
        frames=frames,
        targets={name: [each.targets.get(name, -1) for each in words] for name in names},
        answers=_answers(tokenizer, words, settings) if settings.text == "questions" else None,
        scores=[each.scores for each in words] if settings.text == "questions" else [],
        skipped=skipped,
        places=places,
        readings=[_tokenise(each, keys, epochs, words, settings) for each in settings.readings],
    )


def _show(sample: Sample, epoch: int, settings: ViewSettings, pixels_FSS3: NDArray[np.uint8]) -> int:
    """Fill the pixels of one sample; how many frames it has."""
    bodies: Sequence[bytes] = (sample.image,)
    if settings.frames:
        numbers = choose_frames(
            1 + len(sample.frames), settings.frames, generator(settings.seed, epoch, sample.key, "frames")
        )
        everything = (sample.image, *sample.frames)
        bodies = [everything[number] for number in numbers]
    random = generator(settings.seed, epoch, sample.key)
    for number, view in enumerate(
        random_views(bodies, sample.extension, settings.image_pixels, settings.augment, random)
    ):
        pixels_FSS3[number] = view
    pixels_FSS3[len(bodies) :] = BLANK
    return len(bodies)


def _choose(sample: Sample, epoch: int, settings: ViewSettings) -> _Words:
    targets = {}
    if settings.label:
        targets["label"] = settings.class_numbers.get(label_of(sample.metadata, settings.label) or "", -1)
    if settings.text == "captions":
        if not sample.captions:
            if settings.reads_text:
                raise RecipeError(
                    f"loader.text: captions, but sample {sample.key} has none; shard with captions.required: true, "
                    "read questions, or leave model.text out"
                )
            return _Words(targets=targets)
        if len(sample.captions) == 1:  # nothing to draw: half of a caption's cost is its generator
            return _Words(sample.captions[0].text, targets=targets)
        random = generator(settings.seed, epoch, sample.key, "text")
        return _Words(choose_caption(sample.captions, settings.language_weights, random), targets=targets)
    random = generator(settings.seed, epoch, sample.key, "text")
    question = choose_question(sample.key, sample.metadata, random)
    answer = choose_answer(question.answers, random)
    targets["answer"] = -1 if answer is None else settings.class_numbers.get(answer, -1)
    return _Words(question.text, answer, targets, _scores(question.answers, settings))


def _scores(answers: Sequence[str], settings: ViewSettings) -> dict[int, float]:
    """Class → what it earns as the answer: a third for each person who gave it, at most 1 (VQA, arXiv 1505.00468); of
    fewer than three people, their share."""
    counts = Counter(settings.class_numbers[answer] for answer in answers if answer in settings.class_numbers)
    return {number: min(1.0, count / min(3, len(answers))) for number, count in counts.items()}


def _tokenise(
    reading: Reading, keys: Sequence[str], epochs: Sequence[int], words: Sequence[_Words], settings: ViewSettings
) -> list[list[int]]:
    randoms = None
    if settings.truncation == "sentences":
        randoms = [generator(settings.seed, epoch, key, "window") for key, epoch in zip(keys, epochs, strict=True)]
    return tokenise(reading.tokenizer, [each.text for each in words], reading.max_tokens, randoms)


def _drop(
    tokens: list[list[int]], keys: Sequence[str], epochs: Sequence[int], settings: ViewSettings
) -> list[list[int]]:
    share = settings.augment.token_dropout
    if not share:
        return tokens
    return [
        drop_tokens(row, share, generator(settings.seed, epoch, key, "dropout"))
        for row, key, epoch in zip(tokens, keys, epochs, strict=True)
    ]


def _answers(tokenizer: Tokenizer, words: Sequence[_Words], settings: ViewSettings) -> list[list[int]]:
    tokens = tokenise(tokenizer, [each.answer or "" for each in words], settings.max_tokens)
    return [[] if each.answer is None else row for each, row in zip(words, tokens, strict=True)]
