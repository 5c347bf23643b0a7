"""Where sentences begin, and runs of whole ones that fit: each sentence is met, none is cut without need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.loading.text import sentence_starts, sentence_window


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
def test_sentences_are_told_apart(sentences: list[str]) -> None:
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
    total = sum(lengths)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
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
    total = sum(lengths)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    met: set[int] = set()
    for number in range(1000):
        first, end = sentence_window(starts, total, room, number / 1000)
        met |= set(range(first, end))
    assert met == set(range(total))


def test_starts_that_no_token_has_or_two_share_are_no_sentences_of_their_own() -> None:
    """A tokenizer may drop what a sentence is made of, or a sentence may begin past the last token."""
    assert sentence_window([0, 4, 4, 10], 10, 5, 0.0) == (0, 4)
    assert sentence_window([0, 4, 4, 10], 10, 6, 0.9) == (4, 10)
    assert sentence_window([3], 10, 5, 0.0) == (0, 3)
