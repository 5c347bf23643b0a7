"""Accuracy of answers to questions about pictures, against several people's answers (VQA, arXiv 1505.00468, section 4;
the benchmark's rules at visualqa.org/evaluation.html).

An answer is right as far as at least three other people gave it. Answers are compared after the benchmark's
normalisation: lower case, numbers as digits, no articles, punctuation or missing apostrophes to tell them apart.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

AGREEMENT = 3  # people who have to have given an answer before it counts as wholly right

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
    """How a contraction is written by those who leave out some of its apostrophes → how it is written."""
    words = [*_PLAIN.split(), *_TWICE.split()]
    for subject in _SUBJECTS.split():
        words += [f"{subject}'{ending}" for ending in ("d", "d've", "ll", "s")]
    found: dict[str, str] = {}
    for word in words:
        places = [place for place, character in enumerate(word) if character == "'"]
        for left_out in (each for count in range(1, len(places) + 1) for each in combinations(places, count)):
            found["".join(character for place, character in enumerate(word) if place not in left_out)] = word
    return {short: word for short, word in found.items() if short not in _WORDS}


CONTRACTIONS = _without_apostrophes()

_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalise_answer(answer: str) -> str:
    """The answer as the benchmark compares it.

    A mark of punctuation beside a space goes, one between letters becomes a space; within an answer that holds a number
    with commas all go. Full stops go, but for those of decimals.
    """
    given = " ".join(answer.replace("\u2019", "'").split())
    has_number = _COMMA_IN_NUMBER.search(given) is not None
    text = given
    for mark in PUNCTUATION:
        gone = has_number or f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if gone else " ")
    text = _FULL_STOP.sub("", text)
    words = [str(NUMBERS.get(word, word)) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(answer: str, people: Sequence[str]) -> float:
    """From 0 to 1: the mean, over leaving out each person in turn, of min(1, the others who agree / 3).

    With fewer than four people, all the others have to agree; one person's answer alone is right or wrong. Raises
    ValueError without one.
    """
    if not people:
        raise ValueError("a question without an answer cannot be scored; leave it out")
    given = normalise_answer(answer)
    counts = Counter(map(normalise_answer, people))
    agree, others = counts[given], len(people) - 1
    if not given:  # an article is all that somebody said: saying nothing does not agree with that
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
    """(what most people say, questions, accuracy) of the answers, at most so `most`, that most questions have."""
    scores = defaultdict[str, list[float]](list)
    for answer, theirs in zip(answers, people, strict=True):
        scores[commonest_answer([theirs])].append(answer_accuracy(answer, theirs))
    commonest = sorted(scores.items(), key=lambda each: (-len(each[1]), each[0]))[:most]
    return [(name, len(found), sum(found) / len(found)) for name, found in commonest]


def commonest_answer(people: Sequence[Sequence[str]]) -> str:
    """What answers best without looking: the answer that most people of all questions gave; "" without one."""
    counts = Counter(normalise_answer(answer) for theirs in people for answer in theirs)
    return counts.most_common(1)[0][0] if counts else ""
