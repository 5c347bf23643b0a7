"""Which words of a sample a view shows: one of its captions or questions, and which of its tokens are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmflow.core.errors import RecipeError
from mmflow.dataset.reader import Caption

QUESTIONS = "questions"  # where the metadata of a sample has them


@dataclass(frozen=True)
class Question:
    """A question on a picture and what people answered, one or more times each; () where nobody did."""

    text: str
    answers: tuple[str, ...]


def choose_caption(captions: Sequence[Caption], weights: Mapping[str, float], random: np.random.Generator) -> str:
    """One of a sample's captions, drawn by its language's weight; the first where all weigh nothing.

    A language that has no weight weighs 1. Draws one number, however many captions there are.
    """
    draw = random.random()
    if len(captions) == 1:
        return captions[0].text
    ends = np.cumsum([weights.get(caption.language, 1.0) for caption in captions])
    return captions[int(np.searchsorted(ends, draw * ends[-1], side="right"))].text if ends[-1] else captions[0].text


def questions_of(key: str, metadata: Mapping[str, object]) -> list[Question]:
    """A sample's questions: metadata["questions"] is [{"question": text, "answers": [text, …]}, …].

    Raises RecipeError naming the sample where its metadata has no such list.
    """
    found = metadata.get(QUESTIONS)
    if not isinstance(found, list) or not found:
        raise RecipeError(
            f"loader.text: questions, but sample {key} has none; its metadata needs "
            '"questions": [{"question": "…", "answers": ["…"]}, …], or read captions instead'
        )
    questions = []
    for each in found:
        if not isinstance(each, dict) or not isinstance(each.get("question"), str):
            raise RecipeError(
                f'loader.text: sample {key} has {str(each)[:80]!r} for a question; write {{"question": "…"}}'
            )
        answers = each.get("answers") or []
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise RecipeError(f"loader.text: sample {key} has {str(answers)[:80]!r} for answers; write a list of texts")
        questions.append(Question(each["question"], tuple(answers)))
    return questions


def choose_question(key: str, metadata: Mapping[str, object], random: np.random.Generator) -> Question:
    """One of a sample's questions. Draws one number. Raises as `questions_of`."""
    draw = random.random()
    questions = questions_of(key, metadata)
    return questions[int(draw * len(questions))]


def label_of(metadata: Mapping[str, object], name: str | None) -> str | None:
    """A sample's class of that name; None where it has none."""
    classes = metadata.get("classes")
    value = classes.get(name) if isinstance(classes, dict) and name is not None else None
    return value if isinstance(value, str) else None


def choose_answer(answers: Sequence[str], random: np.random.Generator) -> str | None:
    """One of the answers, so as often as people gave it (ten of them in VQA); None where there are none.

    Draws one number.
    """
    draw = random.random()
    return answers[int(draw * len(answers))] if answers else None


def drop_tokens(tokens: Sequence[int], share: float, random: np.random.Generator) -> list[int]:
    """The tokens less a random share, the first and last always kept; all of them where nothing would be left."""
    if len(tokens) < 3:
        return list(tokens)
    kept = [token for token, keep in zip(tokens[1:-1], random.random(len(tokens) - 2) >= share, strict=True) if keep]
    return [tokens[0], *kept, tokens[-1]] if kept else list(tokens)


CLOSERS = r"[\"'”’»」』）】》\)\]]*"
# Marks that nothing else is written with, so that no space need follow: Chinese and Japanese, Devanagari, Arabic, Urdu,
# Armenian, Ethiopic, Burmese, Khmer.
SURE = r"[。！？｡।॥؟۔։።፧፨။។]+"
# Marks that also stand within numbers and names: only before a space.
UNSURE = r"[.!?…]+"
END = re.compile(rf"{SURE}{CLOSERS}|(?P<unsure>{UNSURE}){CLOSERS}(?=\s+(?P<next>\S))|\n+")


def sentence_starts(text: str) -> list[int]:
    """Ascending places in the text at which its sentences begin, the first of them 0.

    A space between two sentences belongs to the second, as it does for byte-level tokenizers. A full stop before a
    small letter ends nothing (SB8).
    """
    starts = [0]
    for end in END.finditer(text):
        if end["unsure"] in (".", "…", "...") and end["next"].islower():
            continue
        if end.end() < len(text):
            starts.append(end.end())
    return starts


def sentence_window(starts: Sequence[int], total: int, room: int, draw: float) -> tuple[int, int]:
    """(first, end) of a run of whole sentences of at most `room` of a text's `total` tokens.

    `starts` are the tokens at which sentences begin. A sentence longer than `room` counts as several. By `draw`, in
    [0, 1), any of them may come first as long as the run is cut short by `room` and not by the text's end.
    """
    if total <= room:
        return 0, total
    bounds = sorted({0, *starts} - {total})
    pieces = np.array([begin for first, end in zip(bounds, [*bounds[1:], total], strict=True)
                       for begin in range(first, end, room)] + [total])  # fmt: skip
    # The first piece from which all the rest has room: later ones would show less of the same.
    last = int(np.searchsorted(pieces, total - room))
    first = int(pieces[int(draw * (last + 1))])
    return first, int(pieces[np.searchsorted(pieces, first + room, side="right") - 1])
