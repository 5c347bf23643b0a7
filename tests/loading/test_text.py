"""The words of a view: captions by language, questions with their answers, dropped tokens, windows of sentences."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import RecipeError
from mmflow.dataset.reader import Caption
from mmflow.loading.text import (
    Question,
    choose_answer,
    choose_caption,
    drop_tokens,
    questions_of,
    sentence_starts,
    sentence_window,
)

QUESTIONS = {
    "questions": [
        {"question": "what colour?", "answers": ["red", "red", "dark red"]},
        {"question": "how many?", "answers": ["2"]},
        {"question": "unanswered?"},
    ]
}


@pytest.mark.parametrize(
    ("weights", "languages", "shares"),
    [
        ({"en": 0.6, "zh": 0.4}, ("en", "zh"), {"0 en": 0.6, "1 zh": 0.4}),
        ({"en": 3}, ("en", "fr"), {"0 en": 0.75, "1 fr": 0.25}),  # a language not named weighs 1
        ({}, ("en", "en", "zh", "zh"), {"0 en": 0.25, "1 en": 0.25, "2 zh": 0.25, "3 zh": 0.25}),
        ({"zh": 0}, ("en", "zh"), {"0 en": 1.0}),
        ({"en": 0}, ("en", "zh"), {"1 zh": 1.0}),
        ({"en": 0, "zh": 0}, ("en", "zh"), {"0 en": 1.0}),
    ],
)
def test_captions_are_drawn_by_their_language_s_weight(
    weights: dict[str, float], languages: tuple[str, ...], shares: dict[str, float]
) -> None:
    captions = tuple(Caption(f"{number} {language}", language) for number, language in enumerate(languages))
    random = np.random.default_rng(0)
    counts = Counter(choose_caption(captions, weights, random) for _ in range(4000))
    assert set(counts) == set(shares)
    for text, share in shares.items():
        assert abs(counts[text] / 4000 - share) < 0.03  # four deviations


def test_every_choice_draws_equally_many_numbers() -> None:
    after = []
    for languages in (("en",), ("en", "zh"), ("zh",)):
        random = np.random.default_rng(5)
        choose_caption(tuple(Caption("text", language) for language in languages), {"zh": 0}, random)
        after.append(random.random())
    for answers in ((), ("yes",), ("yes", "no")):
        random = np.random.default_rng(5)
        choose_answer(answers, random)
        after.append(random.random())
    assert len(set(after)) == 1


def test_questions_come_with_their_answers() -> None:
    assert questions_of("key", QUESTIONS) == [
        Question("what colour?", ("red", "red", "dark red")),
        Question("how many?", ("2",)),
        Question("unanswered?", ()),
    ]


def test_answers_are_drawn_as_often_as_people_gave_them() -> None:
    random = np.random.default_rng(0)
    counts = Counter(choose_answer(("red", "red", "dark red"), random) for _ in range(3000))
    assert 1880 < counts["red"] < 2120
    assert counts["red"] + counts["dark red"] == 3000
    assert choose_answer((), random) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, 'sample key-1 has none; its metadata needs "questions"'),
        ({"questions": []}, "has none"),
        ({"questions": "what?"}, "has none"),
        ({"questions": ["what?"]}, "sample key-1: 'what?' is not a question"),
        ({"questions": [{"question": "what?", "answers": "red"}]}, "key-1: answers 'red' are not a list of texts"),
    ],
)
def test_a_sample_without_questions_is_named(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        questions_of("key-1", metadata)


@given(tokens=st.lists(st.integers(5, 99), max_size=12), share=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_dropping_tokens_keeps_both_ends_the_order_and_something_between(
    tokens: list[int], share: float, seed: int
) -> None:
    row = [2, *tokens, 3]
    kept = drop_tokens(row, share, np.random.default_rng(seed))
    assert (kept[0], kept[-1]) == (2, 3)
    rest = iter(row)
    assert all(token in rest for token in kept)  # a subsequence
    assert len(kept) > 2 or not tokens


def test_tokens_are_dropped_at_their_share() -> None:
    row = [2, *range(5, 5 + 20_000), 3]
    kept = drop_tokens(row, 0.25, np.random.default_rng(0))
    assert abs(len(kept) / len(row) - 0.75) < 0.02
    assert drop_tokens(row, 0.0, np.random.default_rng(0)) == row


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentences",
    [
        ["One red apple.", " Two pears!", " Three?"],
        ["It costs 3.50 at example.com.", " Cheap."],
        ["He said “Go away!”", " And left."],
        ["Wait… what?", " Nothing."],
        ["They use e.g. pears and other fruit.", " Ångström did."],
        ["一只红苹果。", "两只梨！", "“三个？”", "完"],
        ["赤いりんご。", "青いりんご（梨。）", "終わり"],
        ["यह एक सेब है।", " वह नाशपाती है॥", " अंत"],
        ["هل هذه تفاحة؟", " نعم."],
        ["یہ سیب ہے۔", " وہ ناشپاتی ہے۔"],
        ["A heading\n", "Then text.", " More text."],
        ["¿Qué es?", " ¡Una manzana!", " Sí."],
        ["no end at all, only commas"],
        [""],
    ],
)
def test_text_is_split_into_sentences(sentences: list[str]) -> None:
    text = "".join(sentences)
    starts = sentence_starts(text)
    assert [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)] == sentences


@given(st.text(alphabet='aA .!?。！\n"”)', max_size=60))
def test_starts_ascend_from_0_and_stay_within(text: str) -> None:
    starts = sentence_starts(text)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < max(1, len(text))


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths=lengths, room=st.integers(1, 40), draw=st.floats(0, 1, exclude_max=True))
def test_a_window_is_a_run_of_whole_sentences_as_long_as_fits(lengths: list[int], room: int, draw: float) -> None:
    total, starts = sum(lengths), [sum(lengths[:number]) for number in range(len(lengths))]
    first, end = sentence_window(starts, total, room, draw)
    assert 0 <= first < end <= total
    assert end - first <= room
    if total <= room:
        assert (first, end) == (0, total)
    else:
        edges = {*starts, total}
        for start, length in zip(starts, lengths, strict=True):
            edges |= set(range(start, start + length, room))  # a longer sentence counts as several
        assert {first, end} <= edges
        following = min((edge for edge in edges if edge > end), default=None)
        assert following is None or following - first > room  # one more would not have fit


@given(lengths=lengths, room=st.integers(1, 40))
def test_every_token_is_met_by_some_draw(lengths: list[int], room: int) -> None:
    total, starts = sum(lengths), [sum(lengths[:number]) for number in range(len(lengths))]
    windows = [sentence_window(starts, total, room, number / 1000) for number in range(1000)]
    assert {token for window in windows for token in range(*window)} == set(range(total))


def test_sentence_starts_without_a_token_of_their_own_are_ignored() -> None:
    """A tokenizer may drop what a sentence is made of, or a sentence may begin past the last token."""
    assert sentence_window([0, 4, 4, 10], 10, 5, 0.0) == (0, 4)
    assert sentence_window([0, 4, 4, 10], 10, 6, 0.9) == (4, 10)
    assert sentence_window([3], 10, 5, 0.0) == (0, 3)
