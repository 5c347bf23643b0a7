"""A batch: what one rank's step is given, put together from rows that any number of workers have loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.core.errors import CorruptArtifactError, CorruptShardError, RecipeError
from mmflow.dataset.reader import Reader, Sample
from mmflow.loading.config import AugmentConfig
from mmflow.loading.plan import LoaderState, Slots
from mmflow.loading.text import choose_answer, choose_caption, choose_question, drop_tokens, label_of
from mmflow.loading.tokens import pad, tokenise
from mmflow.loading.transforms import choose_frames, generator, random_views

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


# Shapes: B rows of this rank, F frames of a clip, T tokens in the longest text, A in the longest answer, S the side of
# a picture in pixels.


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's slice of a global batch. Rows whose `real` is False stand for nothing and must count nowhere."""

    keys: tuple[str, ...]
    pixels: Tensor  # (B, 3, S, S) uint8, channels last in memory; clips: (B, F, 3, S, S)
    frame_mask: Tensor | None = None  # (B, F) bool, of clips: False where a clip has fewer frames
    token_ids: Tensor  # (B, T) int64
    token_mask: Tensor  # (B, T) int64, 1 where real
    real: Tensor  # (B,) bool: False for padding, and for what was left out
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """`label` and `answer`: (B,) int64, the class's number or -1 where it is not known; `answer_ids` and `answer_mask`:
    (B, A) int64, the answer as tokens; `answer_scores`: (B, classes) fp32, what each would earn as the answer."""
    readings: tuple[tuple[Tensor, Tensor], ...] = ()  # token ids and mask as other models read the texts, (B, T) each
    places: NDArray[np.int64] | None = None  # (B, 4): dataset, shard, row and view, by which what is stored is found
    skipped: tuple[str, ...] = ()  # a line for each sample that was left out: which, and why
    task: int = 0  # the number of the task that it is of, where there are several
    state: LoaderState  # where the batch after this one begins

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed."""
        return replace(
            self,
            pixels=change(self.pixels),
            frame_mask=None if self.frame_mask is None else change(self.frame_mask),
            token_ids=change(self.token_ids),
            token_mask=change(self.token_mask),
            real=change(self.real),
            targets={name: change(target) for name, target in self.targets.items()},
            readings=tuple((change(ids), change(mask)) for ids, mask in self.readings),
        )


def assemble(
    parts: Sequence[Loaded],
    pixels_BFSS3: NDArray[np.uint8],
    state: LoaderState,
    *,
    clips: bool,
    pad_id: int,
    num_classes: int = 0,
    reading_pad_ids: Sequence[int] = (),
) -> Batch:
    """The batch of consecutive slots whose pixels lie in a buffer. The buffer is copied: it may be filled again."""
    token_ids, token_mask = pad([row for part in parts for row in part.tokens], pad_id)
    targets = {
        name: torch.tensor([number for part in parts for number in part.targets[name]]) for name in parts[0].targets
    }
    if parts[0].answers is not None:
        # A row of one token more, so that a batch in which nobody knows an answer has a width too.
        answers = pad([*(row for part in parts for row in part.answers or ()), [pad_id]], pad_id)
        targets["answer_scores"] = _dense([row for part in parts for row in part.scores], num_classes)
        targets |= {
            name: torch.from_numpy(array[:-1])
            for name, array in zip(("answer_ids", "answer_mask"), answers, strict=True)
        }
    pixels_BF3SS = torch.from_numpy(pixels_BFSS3).clone().permute(0, 1, 4, 2, 3)
    frames_B = torch.tensor([number for part in parts for number in part.frames])
    return Batch(
        keys=tuple(key for part in parts for key in part.keys),
        pixels=pixels_BF3SS if clips else pixels_BF3SS[:, 0],
        frame_mask=torch.arange(pixels_BFSS3.shape[1]) < frames_B[:, None] if clips else None,
        token_ids=torch.from_numpy(token_ids),
        token_mask=torch.from_numpy(token_mask),
        real=torch.tensor([each for part in parts for each in part.real]),
        targets=targets,
        readings=tuple(
            _tensors([row for part in parts for row in part.readings[number]], pad_of_reading)
            for number, pad_of_reading in enumerate(reading_pad_ids)
        ),
        places=np.array([place for part in parts for place in part.places], np.int64).reshape(-1, 4),
        skipped=tuple(line for part in parts for line in part.skipped),
        state=state,
    )


def _tensors(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad(rows, pad_id)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _dense(scores: Sequence[Mapping[int, float]], num_classes: int) -> Tensor:
    """(B, classes) fp32, 0 where a row has no score."""
    dense_BC = torch.zeros(len(scores), num_classes)
    for row, found in enumerate(scores):
        for number, score in found.items():
            dense_BC[row, number] = score
    return dense_BC


def pixels_tensor(views: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(B, 3, height, width) uint8 whose memory is channels last, as the pictures are: no copy is made to turn them."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def normalise(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 pictures (…, 3, height, width) as float with the mean and deviation that the model was trained with."""
    # Whole lines of a picture, three values a pixel as they lie in memory: with a mean for each colour beside them, all
    # of a line is one operation of the processor's widest kind, where a colour at a time takes two and a half times as
    # long. In place: two copies of a batch in floats would be half of that again.
    lines = pixels.movedim(-3, -1).flatten(-2).float()
    width = pixels.shape[-1]
    shift = torch.tensor(mean, device=pixels.device).mul(255).repeat(width)
    scale = torch.tensor(std, device=pixels.device).mul(255).reciprocal().repeat(width)
    return lines.sub_(shift).mul_(scale).view(*pixels.shape[:-3], -1, width, 3).movedim(-1, -3)
