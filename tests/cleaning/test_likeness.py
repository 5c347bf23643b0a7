"""Captions that are too alike: what counts as a word, which candidates are found, and who stays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.cleaning.duplicates import (
    alike_owners,
    bands_of_texts,
    group_buckets,
    plan_minhash,
    shingles,
    similarity,
)

TEXTS = st.lists(st.text("ab c", min_size=1, max_size=12), max_size=25)


def test_shingles_are_three_words_without_case_and_punctuation() -> None:
    assert shingles("A red FOX, (asleep).") == {("a", "red", "fox"), ("red", "fox", "asleep")}
    assert shingles("Red fox") == {("red",), ("fox",)}
    assert shingles("狐狸睡覺") == {("狐", "狸", "睡"), ("狸", "睡", "覺")}
    assert shingles("!!!") == {("!!!",)}
    assert shingles(" ") == frozenset()


def test_similarity_is_jaccards() -> None:
    assert similarity(shingles("a b c d"), shingles("a b c e")) == pytest.approx(1 / 3)
    assert similarity(shingles("a b c"), shingles("A  b c.")) == 1
    assert similarity(shingles(" "), shingles(" ")) == 0


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_pairs_at_the_threshold_become_candidates(threshold: float) -> None:
    rows, bands = plan_minhash(threshold)
    assert 1 - (1 - threshold**rows) ** bands >= 0.999


def test_candidates_found_are_nearly_all_pairs_above_the_threshold() -> None:
    random = np.random.default_rng(0)
    ones = random.integers(0, 10_000, (500, 30)).astype(str).tolist()
    others = [[*words[:-2], "else", "where"] for words in ones]
    texts = [" ".join(words) for words in ones + others]
    assert all(
        similarity(shingles(one), shingles(other)) >= 0.8 for one, other in zip(texts[:500], texts[500:], strict=True)
    )
    bands = bands_of_texts(texts, 0.8)
    assert (bands[:500] == bands[500:]).any(axis=1).sum() >= 498
    assert (bands[:499] == bands[501:]).any(axis=1).sum() == 0


def test_bands_depend_on_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"caption number {number} of many" for number in range(50)]
    whole = bands_of_texts(texts, 0.8)
    monkeypatch.setattr("mmflow.cleaning.duplicates.BATCH", 7)
    assert (bands_of_texts(texts[::-1], 0.8)[::-1] == whole).all()


@given(TEXTS, st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.integers(0, 25))
def test_survivors_are_those_of_a_plain_loop(texts: list[str], threshold: float, num_fixed: int) -> None:
    sets = [shingles(text) for text in texts]
    survivors: list[int] = []
    expected = []
    for place, own in enumerate(sets):
        like = [other for other in survivors if similarity(own, sets[other]) >= threshold]
        expected.append(like[0] if like and place >= num_fixed else place)
        if expected[-1] == place:
            survivors.append(place)
    owners, degrees = alike_owners(sets, [[0]] * len(sets), threshold, num_fixed)
    assert owners.tolist() == expected
    for place, owner in enumerate(expected):
        assert degrees[place] == (similarity(sets[place], sets[owner]) if owner != place else 1)


def test_only_those_that_share_a_bucket_are_compared() -> None:
    sets = [shingles("a b c")] * 3
    buckets = group_buckets(np.array([7, 8, 9]), np.array([9, 7, 8, 9]), np.array([1, 1, 2, 3]))
    assert buckets == [[1], [2], [1, 3]]
    assert alike_owners(sets, buckets, 0.9, 0)[0].tolist() == [0, 1, 0]
