"""The words of a view: one of the sample's captions or questions, a run of its sentences, and which tokens are dropped.

Functions that draw from `random` always draw the same number of values, whatever there is to choose from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmflow.core.errors import RecipeError
from mmflow.dataset.reader import Caption

QUESTIONS = "questions"  # their key in a sample's metadata

CLOSERS = r"[\"'”’»」』）】》\)\]]*"
# Marks that only end sentences, so no space need follow: Chinese and Japanese, Devanagari, Arabic, Urdu, Armenian,
# Ethiopic, Burmese, Khmer.
SURE = r"[。！？｡।॥؟۔։።፧፨။።]+"
# Marks that also stand within numbers and names: they end a sentence only before a space.
UNSURE = r"[.!?…]+"
END = re.compile(rf"{SURE}{CLOSERS}|(?P<unsure>{UNSURE}){CLOSERS}(?=\s+(?P<next>\S))|\n+")


@dataclass(frozen=True)
class Question:
    """A question about a picture and people's answers, repeated as often as they were given; () without answers."""

    text: str
    answers: tuple[str, ...]


def choose_caption(captions: Sequence[Caption], weights: Mapping[str, float], random: np.random.Generator) -> str:
    """A caption drawn by its language's weight, 1 where none is given; the first if all weights are 0."""
    draw = random.random()
    ends = np.cumsum([weights.get(caption.language, 1.0) for caption in captions])
    return captions[int(np.searchsorted(ends, draw * ends[-1], side="right"))].text if ends[-1] else captions[0].text


def questions_of(key: str, metadata: Mapping[str, object]) -> list[Question]:
    """A sample's questions: metadata["questions"] is [{"question": text, "answers": [text, …]}, …].

    Raises RecipeError naming the sample if its metadata has no such list.
    """
    entries = metadata.get(QUESTIONS)
    if not isinstance(entries, list) or not entries:
        raise RecipeError(
            f"loader.text: questions, but sample {key} has none; its metadata needs "
            '"questions": [{"question": "…", "answers": ["…"]}, …], or set loader.text: captions'
        )
    questions = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
            raise RecipeError(
                f'loader.text: sample {key}: {str(entry)[:80]!r} is not a question; write {{"question": "…"}}'
            )
        answers = entry.get("answers") or []
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise RecipeError(f"loader.text: sample {key}: answers {str(answers)[:80]!r} are not a list of texts")
        questions.append(Question(entry["question"], tuple(answers)))
    return questions


def label_of(metadata: Mapping[str, object], name: str | None) -> str | None:
    """A sample's class of that name, or None."""
    classes = metadata.get("classes")
    value = classes.get(name) if isinstance(classes, dict) and name is not None else None
    return value if isinstance(value, str) else None


def choose_answer(answers: Sequence[str], random: np.random.Generator) -> str | None:
    """An answer, as often as people gave it (ten of them in VQA), or None without answers."""
    draw = random.random()
    return answers[int(draw * len(answers))] if answers else None


def drop_tokens(tokens: Sequence[int], share: float, random: np.random.Generator) -> list[int]:
    """The tokens without a random share of them. The first and last stay; all stay if nothing between would be left."""
    if len(tokens) < 3:
        return list(tokens)
    kept = [token for token, keep in zip(tokens[1:-1], random.random(len(tokens) - 2) >= share, strict=True) if keep]
    return [tokens[0], *kept, tokens[-1]] if kept else list(tokens)


def sentence_starts(text: str) -> list[int]:
    """The places in the text where sentences begin, ascending from 0.

    The rules are the part of Unicode's UAX #29 that matters here (SB4, SB6, SB8, SB8a–SB11). There is no list of
    abbreviations: a wrong cut costs an augmentation little. A full stop before a small letter ends nothing (SB8). The
    space between two sentences belongs to the second, as in byte-level tokenizers.
    """
    starts = [0]
    for end in END.finditer(text):
        if end["unsure"] in (".", "…", "...") and end["next"].islower():
            continue
        if end.end() < len(text):
            starts.append(end.end())
    return starts


def sentence_window(starts: Sequence[int], total: int, room: int, draw: float) -> tuple[int, int]:
    """(first, end) of a run of whole sentences, at most `room` of a text's `total` tokens.

    `starts` are the tokens where sentences begin. A sentence longer than `room` counts as several. `draw` in [0, 1)
    chooses the first sentence among those whose run is cut by `room` and not by the text's end.
    """
    if total <= room:
        return 0, total
    bounds = sorted({0, *starts} - {total})
    pieces = np.array([begin for first, end in zip(bounds, [*bounds[1:], total], strict=True)
                       for begin in range(first, end, room)] + [total])  # fmt: skip
    # The first piece from which the whole rest fits: later ones would show less of the same.
    last = int(np.searchsorted(pieces, total - room))
    first = int(pieces[int(draw * (last + 1))])
    return first, int(pieces[np.searchsorted(pieces, first + room, side="right") - 1])
