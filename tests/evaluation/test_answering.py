"""VQA's accuracy: its normalisation by cases from its rules, its consensus by a plain loop over people left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.evaluation.answering import (
    accuracy_by_answer,
    answer_accuracy,
    answering_metrics,
    commonest_answer,
    normalise_answer,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  the\tRed\nbus ", "red bus"),
        ("an apple on a table", "apple on table"),
        ("two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("1,000", "1000"),
        ("1,000 people, or more", "1000 people or more"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("u.s.a.", "usa"),
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("11:30", "11:30"),
        ("dont", "don't"),
        ("it's", "it's"),
        ("isnt", "isn't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("youre", "you're"),
        ("it\u2019ll", "it'll"),
        ("shell", "shell"),
        ("红色", "红色"),
        ("A", ""),
    ],
)
def test_answers_are_compared_after_the_benchmarks_normalisation(answer: str, expected: str) -> None:
    assert normalise_answer(answer) == expected


@given(st.text(alphabet="abd tow.,'-/!?0123", max_size=20))
def test_case_and_spaces_never_tell_answers_apart(answer: str) -> None:
    assert normalise_answer(f"  {answer.upper()} ") == normalise_answer(answer)
    assert normalise_answer(answer) == " ".join(normalise_answer(answer).split())


@pytest.mark.parametrize(("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_four_of_ten_people_make_an_answer_wholly_right(agree: int, expected: float) -> None:
    people = ["red"] * agree + [f"other {number}" for number in range(10 - agree)]
    assert answer_accuracy("Red.", people) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["red", "Blue", "2", "two"]), min_size=2, max_size=12), st.sampled_from(["red", "two"]))
def test_accuracy_is_the_mean_over_each_person_left_out(people: list[str], answer: str) -> None:
    given_answers = [normalise_answer(each) for each in people]
    scores = []
    for left_out in range(len(people)):
        others = given_answers[:left_out] + given_answers[left_out + 1 :]
        scores.append(min(1.0, others.count(normalise_answer(answer)) / min(3, len(others))))
    assert answer_accuracy(answer, people) == pytest.approx(sum(scores) / len(scores))


def test_one_persons_answer_is_right_or_wrong() -> None:
    assert answer_accuracy("a circle", ["circle"]) == 1.0
    assert answer_accuracy("square", ["circle"]) == 0.0


def test_saying_nothing_agrees_with_nobody() -> None:
    assert answer_accuracy("", ["a", "the"]) == 0.0
    assert answer_accuracy("the", ["a"]) == 0.0


def test_metrics_are_means_over_questions() -> None:
    assert answering_metrics(["red", "2"], [["red"], ["two", "2", "3", "2"]]) == {
        "accuracy": pytest.approx((1 + (3 * 2 / 3 + 1) / 4) / 2),
        "rows": 2.0,
    }
    assert answering_metrics([], []) == {"accuracy": 0.0, "rows": 0.0}


def test_the_commonest_answer_is_counted_after_normalisation() -> None:
    assert commonest_answer([["Two", "2"], ["2.", "red"], ["red"]]) == "2"
    assert commonest_answer([]) == ""


def test_accuracy_by_the_answer_that_most_people_gave() -> None:
    people = [["Red"], ["red", "red", "dark"], ["two"], ["red"]]
    assert accuracy_by_answer(["red", "dark", "2", "blue"], people, 2) == [("red", 3, 4 / 9), ("2", 1, 1.0)]
    assert accuracy_by_answer(["red", "dark", "2", "blue"], people, 1) == [("red", 3, 4 / 9)]
