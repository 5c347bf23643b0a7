"""Slots to a batch: workers read, view and tokenise rows, and the rows of all workers become one batch of tensors."""

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
from mmflow.loading.text import choose_answer, choose_caption, drop_tokens, label_of, questions_of
from mmflow.loading.tokens import pad, special_tokens, tokenise
from mmflow.loading.transforms import choose_frames, generator, random_views

# Shapes: B rows of this rank, F frames of a clip (1 for stills), T tokens in the longest text, A in the longest answer,
# S the side of a picture in pixels, C classes.

BLANK = 128  # pixels without a picture: mid grey, whatever else is in the batch


@dataclass(frozen=True)
class Reading:
    """How a model reads the texts of a batch."""

    tokenizer: Tokenizer
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What decides a view of a sample, besides its key and its epoch."""

    seed: int
    image_pixels: int
    max_tokens: int
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    language_weights: Mapping[str, float] = field(default_factory=dict)
    frames: int = 0  # per clip; 0: the still image
    text: Literal["captions", "questions"] = "captions"
    reads_text: bool = True  # whether the model does; a model of pictures alone takes samples without a caption
    truncation: Literal["head", "sentences"] = "head"
    label: str | None = None
    classes: tuple[str, ...] = ()  # the labels, or the answers when the text is questions
    on_corrupt: Literal["stop", "skip"] = "stop"
    stored_views: int = 0  # epoch e shows view e modulo this, because teacher outputs are stored for those views; 0: e
    readings: tuple[Reading, ...] = ()  # how other models read the same texts, without token dropout

    @cached_property
    def class_numbers(self) -> dict[str, int]:
        """Class → its number."""
        return {name: number for number, name in enumerate(self.classes)}


@dataclass(slots=True, kw_only=True)
class Row:
    """What fills a slot, except its pixels. A sample that is left out has no key."""

    place: tuple[int, int, int, int]  # dataset, shard, row, view
    real: bool
    key: str = ""
    num_frames: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    readings: list[list[int]] = field(default_factory=list)  # tokens of each further reading
    answer: str | None = None
    answer_tokens: list[int] = field(default_factory=list)  # [] without an answer
    targets: dict[str, int] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)  # class → its score as the answer
    skipped: str = ""  # why the sample was left out


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's slice of a global batch. Rows that are not `real` are padding and must not count anywhere."""

    keys: tuple[str, ...]
    pixels: Tensor  # (B, 3, S, S) uint8, channels last in memory; clips: (B, F, 3, S, S)
    frame_mask: Tensor | None = None  # clips: (B, F) bool, False past a clip's last frame
    token_ids: Tensor  # (B, T) int64
    token_mask: Tensor  # (B, T) int64, 1 where real
    real: Tensor  # (B,) bool: False for padding and for samples left out
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """`label` and `answer`: (B,) int64, the class's number or -1 if unknown; `answer_ids` and `answer_mask`: (B, A)
    int64, the answer as tokens; `answer_scores`: (B, C) fp32, the score of each class as the answer."""
    readings: tuple[tuple[Tensor, Tensor], ...] = ()  # token ids and mask of each further reading, (B, T) each
    places: NDArray[np.int64] | None = None  # (B, 4): dataset, shard, row and view, to find stored teacher outputs
    skipped: tuple[str, ...] = ()  # a line for each sample that was left out: which, and why
    task: int = 0  # the number of its task, with several tasks
    state: LoaderState  # where the next batch begins

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


def load_slots(
    readers: Sequence[Reader],
    tokenizer: Tokenizer,
    settings: ViewSettings,
    slots: Slots,
    pixels_BFSS3: NDArray[np.uint8],
) -> list[Row]:
    """Load the samples of some slots: fill their pixels and return their rows.

    Raises CorruptArtifactError naming shard, row and key for a damaged sample or picture; with on_corrupt: skip, its
    row is not real instead. Always raises MissingArtifactError for a missing shard.
    """
    views = slots.epoch % settings.stored_views if settings.stored_views else slots.epoch
    places = zip(slots.dataset.tolist(), slots.shard.tolist(), slots.row.tolist(), views.tolist(), strict=True)
    rows = []
    for place, real, pixels_FSS3 in zip(places, slots.real.tolist(), pixels_BFSS3, strict=True):
        row = Row(place=place, real=real)
        try:
            _read(readers[place[0]], row, settings, pixels_FSS3)
        except CorruptArtifactError as error:
            if settings.on_corrupt == "stop" or isinstance(error, CorruptShardError):
                raise
            pixels_FSS3[:] = BLANK
            # A padding slot repeats another one, which reports the sample.
            row = Row(place=place, real=False, skipped=str(error) if real else "")
        rows.append(row)
    _tokenise(rows, Reading(tokenizer, settings.max_tokens), settings)
    return rows


def _read(reader: Reader, row: Row, settings: ViewSettings, pixels_FSS3: NDArray[np.uint8]) -> None:
    """Fill the pixels of one sample, and its row with everything but tokens."""
    _, shard, number, view = row.place
    sample = reader.read(shard, number)
    try:
        row.num_frames = _show(sample, view, settings, pixels_FSS3)
    except CorruptArtifactError as error:
        uri = reader.dataset.tar_uri(reader.shards[shard])
        raise CorruptArtifactError(f"{uri}: row {number} ({sample.key}): {error}") from error
    row.key = sample.key
    if settings.label:
        row.targets["label"] = settings.class_numbers.get(label_of(sample.metadata, settings.label) or "", -1)
    if settings.text == "questions":
        random = generator(settings.seed, view, sample.key, "text")
        questions = questions_of(sample.key, sample.metadata)
        question = questions[int(random.random() * len(questions))]
        row.text, row.answer = question.text, choose_answer(question.answers, random)
        row.targets["answer"] = -1 if row.answer is None else settings.class_numbers.get(row.answer, -1)
        row.scores = answer_scores(question.answers, settings.class_numbers)
    elif len(sample.captions) == 1:  # nothing to draw, and the generator is half of a caption's cost
        row.text = sample.captions[0].text
    elif sample.captions:
        random = generator(settings.seed, view, sample.key, "text")
        row.text = choose_caption(sample.captions, settings.language_weights, random)
    elif settings.reads_text:
        raise RecipeError(
            f"loader.text: captions, but sample {sample.key} has none; shard with captions.required: true, "
            "read questions, or remove model.text"
        )


def _show(sample: Sample, view: int, settings: ViewSettings, pixels_FSS3: NDArray[np.uint8]) -> int:
    """Fill the pixels of one sample, and return how many frames it has."""
    bodies = [sample.image]
    if settings.frames:
        random = generator(settings.seed, view, sample.key, "frames")
        frames = (sample.image, *sample.frames)
        bodies = [frames[number] for number in choose_frames(len(frames), settings.frames, random)]
    random = generator(settings.seed, view, sample.key)
    views = random_views(bodies, sample.extension, settings.image_pixels, settings.augment, random)
    for pixels_SS3, frame in zip(pixels_FSS3, views, strict=False):
        pixels_SS3[:] = frame
    pixels_FSS3[len(bodies) :] = BLANK
    return len(bodies)


def answer_scores(answers: Sequence[str], class_numbers: Mapping[str, int]) -> dict[int, float]:
    """Class → its score as the answer: a third for each person who gave it, at most 1 (VQA, arXiv 1505.00468). With
    fewer than three people, their share."""
    counts = Counter(class_numbers[answer] for answer in answers if answer in class_numbers)
    return {number: min(1.0, count / min(3, len(answers))) for number, count in counts.items()}


def _tokenise(rows: Sequence[Row], own: Reading, settings: ViewSettings) -> None:
    """Fill the tokens of the rows."""

    def randoms(subject: Literal["window", "dropout"]) -> list[np.random.Generator]:
        return [generator(settings.seed, row.place[3], row.key, subject) for row in rows]

    def tokens_of(reading: Reading) -> list[list[int]]:
        windows = randoms("window") if settings.truncation == "sentences" else None
        return tokenise(reading.tokenizer, [row.text for row in rows], reading.max_tokens, windows)

    for row, tokens, *readings in zip(rows, tokens_of(own), *map(tokens_of, settings.readings), strict=True):
        row.tokens, row.readings = tokens, readings
    if share := settings.augment.token_dropout:
        for row, random in zip(rows, randoms("dropout"), strict=True):
            row.tokens = drop_tokens(row.tokens, share, random)
    answered = [row for row in rows if row.answer is not None]
    answers = tokenise(own.tokenizer, [row.answer or "" for row in answered], own.max_tokens)
    for row, answer in zip(answered, answers, strict=True):
        row.answer_tokens = answer


def assemble(
    rows: Sequence[Row], pixels_BFSS3: NDArray[np.uint8], state: LoaderState, settings: ViewSettings, pad_id: int
) -> Batch:
    """The batch of these rows and pixels. The pixels are copied, because workers fill their buffer again."""
    targets = {}
    if settings.label:
        targets["label"] = torch.tensor([row.targets.get("label", -1) for row in rows])
    if settings.text == "questions":
        targets["answer"] = torch.tensor([row.targets.get("answer", -1) for row in rows])
        scores_BC = torch.zeros(len(rows), len(settings.classes))
        for scores_C, row in zip(scores_BC, rows, strict=True):
            for number, score in row.scores.items():
                scores_C[number] = score
        targets["answer_scores"] = scores_BC
        # With an extra row of one token, a batch without answers has a width of 1 too.
        ids_BA, mask_BA = _padded([*(row.answer_tokens for row in rows), [pad_id]], pad_id)
        targets |= {"answer_ids": ids_BA[:-1], "answer_mask": mask_BA[:-1]}
    pixels_BF3SS = torch.from_numpy(pixels_BFSS3).clone().permute(0, 1, 4, 2, 3)
    frames_B = torch.tensor([row.num_frames for row in rows])
    token_ids, token_mask = _padded([row.tokens for row in rows], pad_id)
    return Batch(
        keys=tuple(row.key for row in rows),
        pixels=pixels_BF3SS if settings.frames else pixels_BF3SS[:, 0],
        frame_mask=torch.arange(pixels_BFSS3.shape[1]) < frames_B[:, None] if settings.frames else None,
        token_ids=token_ids,
        token_mask=token_mask,
        real=torch.tensor([row.real for row in rows]),
        targets=targets,
        readings=tuple(
            _padded([row.readings[number] for row in rows], special_tokens(reading.tokenizer).pad)
            for number, reading in enumerate(settings.readings)
        ),
        places=np.array([row.place for row in rows], np.int64),
        skipped=tuple(row.skipped for row in rows if row.skipped),
        state=state,
    )


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad(rows, pad_id)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pixels_tensor(views: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(B, 3, height, width) uint8 with channels last in memory, as in the pictures, so turning them needs no copy."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def normalise(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 pictures (…, 3, height, width) as floats, with the mean and deviation that the model was trained with."""
    # Whole lines of a picture, three values a pixel as they lie in memory: with the means repeated beside them, a line
    # is one vectorised operation. One colour at a time takes two and a half times as long. In place: two more copies
    # of a batch in floats would add half of that again.
    lines = pixels.movedim(-3, -1).flatten(-2).float()
    width = pixels.shape[-1]
    shift = torch.tensor(mean, device=pixels.device).mul(255).repeat(width)
    scale = torch.tensor(std, device=pixels.device).mul(255).reciprocal().repeat(width)
    return lines.sub_(shift).mul_(scale).view(*pixels.shape[:-3], -1, width, 3).movedim(-1, -3)
