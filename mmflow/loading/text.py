"""Which words of a sample a view shows: one of its captions or questions, and which of its tokens are left out."""

from __future__ import annotations

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
