"""Answers to questions about pictures, against several people's answers (VQA, arXiv 1505.00468, section 4; the
benchmark's rules at visualqa.org/evaluation.html).

An answer that three other people gave is wholly right. Answers are compared after the benchmark's normalisation: lower
case, numbers as digits, without articles, punctuation and differences of apostrophes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from mmflow.core.errors import RecipeError
from mmflow.evaluation.examination import Examination, Metrics, Outcome, Rows, Subject, Trained, spread
from mmflow.inference.generation import WritingConfig
from mmflow.inference.result import Gives, Result
from mmflow.inference.tasks.answer import Answer
from mmflow.training.config import tasks_of

MOST_ANSWERS = 40  # commonest answers, each with its accuracy

# --- the benchmark's rules ------------------------------------------------------------------------------------------

AGREEMENT = 3  # other people whose agreement makes an answer wholly right

_NUMBER_WORDS = "none zero one two three four five six seven eight nine ten"
NUMBERS = {word: max(0, place - 1) for place, word in enumerate(_NUMBER_WORDS.split())}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_SUBJECTS = "he it she somebody someone something there they who you"
_PLAIN = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't how'd how'll how's i'm i've isn't "
    "ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't "
    "that's there're they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who've why'll why're why's won't would've wouldn't y'all you're you've"
)
_TWICE = "couldn't've hadn't've i'd've mightn't've 'ow's'at shouldn't've we'd've wouldn't've y'all'll y'all'd've"
_WORDS = frozenset({"hell", "its", "shed", "shell"})  # contractions without their apostrophe that are words too


def _without_apostrophes() -> dict[str, str]:
    """A contraction without some of its apostrophes → the contraction."""
    words = [*_PLAIN.split(), *_TWICE.split()]
    for subject in _SUBJECTS.split():
        words += [f"{subject}'{ending}" for ending in ("d", "d've", "ll", "s")]
    shortened: dict[str, str] = {}
    for word in words:
        places = [place for place, character in enumerate(word) if character == "'"]
        for count in range(1, len(places) + 1):
            for left_out in combinations(places, count):
                shortened["".join(letter for place, letter in enumerate(word) if place not in left_out)] = word
    return {short: word for short, word in shortened.items() if short not in _WORDS}


CONTRACTIONS = _without_apostrophes()

_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalise_answer(answer: str) -> str:
    """The answer as the benchmark compares it.

    A punctuation mark beside a space is removed, one between letters becomes a space; an answer that holds a number
    with commas loses all of them. Full stops are removed, except in decimals.
    """
    original = " ".join(answer.replace("\u2019", "'").split())
    has_number = _COMMA_IN_NUMBER.search(original) is not None
    text = original
    for mark in PUNCTUATION:
        removed = has_number or f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if removed else " ")
    text = _FULL_STOP.sub("", text)
    words = [str(NUMBERS.get(word, word)) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(answer: str, people: Sequence[str]) -> float:
    """From 0 to 1: leave out each person in turn, and take the mean of min(1, the others who agree / 3).

    With fewer than four people, all the others have to agree; one person's answer alone is right or wrong. `people` are
    at least one.
    """
    normalised = normalise_answer(answer)
    agree, others = Counter(map(normalise_answer, people))[normalised], len(people) - 1
    if not normalised:  # saying nothing does not agree with somebody who only said an article
        return 0.0
    if not others:
        return float(agree)
    needed = min(AGREEMENT, others)
    without_one_who_agrees = min(1.0, (agree - 1) / needed) if agree else 0.0
    without_another = min(1.0, agree / needed)
    return (agree * without_one_who_agrees + (len(people) - agree) * without_another) / len(people)


def answering_metrics(answers: Sequence[str], people: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"accuracy", "rows"}; accuracy 0 without a row."""
    scores = [answer_accuracy(answer, theirs) for answer, theirs in zip(answers, people, strict=True)]
    return {"accuracy": sum(scores) / len(scores) if scores else 0.0, "rows": float(len(scores))}


def accuracy_by_answer(
    answers: Sequence[str], people: Sequence[Sequence[str]], most: int
) -> list[tuple[str, int, float]]:
    """(what most people say, questions, accuracy) for the `most` answers that the most questions have."""
    scores = defaultdict[str, list[float]](list)
    for answer, theirs in zip(answers, people, strict=True):
        scores[commonest_answer([theirs])].append(answer_accuracy(answer, theirs))
    commonest = sorted(scores.items(), key=lambda item: (-len(item[1]), item[0]))[:most]
    return [(name, len(values), sum(values) / len(values)) for name, values in commonest]


def commonest_answer(people: Sequence[Sequence[str]]) -> str:
    """The answer that most people gave over all questions, which is the best without looking; "" without one."""
    counts = Counter(normalise_answer(answer) for theirs in people for answer in theirs)
    return counts.most_common(1)[0][0] if counts else ""


# --- the examination ------------------------------------------------------------------------------------------------


class AnsweringConfig(WritingConfig):
    """Questions about pictures (`questions` in a sample's metadata): answered by the head `classes` over known answers
    where the model has one, or written by its decoder, as the settings say."""

    search: Literal["greedy", "beam", "nucleus"] = "greedy"
    """The likeliest token at each step; the likeliest text among several; or tokens drawn from the likeliest."""


def _asks(section: AnsweringConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return (Answer(**section.model_dump()),)


def _answer(subject: Subject, section: AnsweringConfig) -> Outcome:
    (result,) = _asks(section, (), subject.gives)
    by_row = subject.column(result, "answers").to_pylist()
    questions = subject.rows.questions
    texts = [question.text for question in questions]
    people = [question.answers for question in questions]
    answers = [by_row[question.row][question.number] for question in questions]
    shown = [
        {
            **subject.rows.reference(questions[place].row),
            "question": texts[place],
            "answer": answers[place],
            "people": list(dict.fromkeys(people[place])),
            "accuracy": answer_accuracy(answers[place], people[place]),
        }
        for place in spread(len(questions))
    ]
    by_answer = [
        {"answer": answer, "questions": count, "accuracy": accuracy}
        for answer, count, accuracy in accuracy_by_answer(answers, people, MOST_ANSWERS)
    ]
    return Outcome({"answering": answering_metrics(answers, people)}, {"answers": shown, "by_answer": by_answer})


def _chance(rows: Rows, section: AnsweringConfig) -> Metrics:
    people = [question.answers for question in rows.questions]
    return {"answering": answering_metrics([commonest_answer(people)] * len(people), people)}


def _check_taught(section: AnsweringConfig, trained: Trained) -> None:
    """Raise RecipeError where no model is trained on questions."""
    tasks = [task for stage, training in trained.items() for task in tasks_of(stage, training)]
    if all(task.loader.text != "questions" for task in tasks):
        raise RecipeError(
            f"evaluate.answering: no model here is taught answers; set {tasks[0].key}.loader.text to questions, or "
            "leave answering out"
        )


ANSWERING = Examination(
    needs=Answer.needs,
    remedy=Answer.remedy,
    asks=_asks,
    examine=_answer,
    chance=_chance,
    check=_check_taught,
    check_rows=lambda rows: rows.questions,
    reads_captions=None,
)
