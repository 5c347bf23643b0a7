"""Near duplicates: searches miss nothing, survivors match a plain loop, and dense groups need little memory."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.cleaning import duplicates
from mmflow.cleaning.duplicates import (
    alike_owners,
    bands_of_texts,
    group_buckets,
    near_owners,
    near_pairs,
    plan_bands,
    plan_minhash,
    shingles,
    similarity,
)

Hashes = npt.NDArray[np.uint64]


@st.composite
def crowds(draw: st.DrawFn) -> Hashes:
    """Hashes around a few centres, some of them equal."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    members = draw(st.lists(st.tuples(st.sampled_from(centres), st.sets(st.integers(0, 63), max_size=9)), max_size=40))
    return np.array([centre ^ sum(1 << bit for bit in bits) for centre, bits in members], np.uint64)


def crowd_around(centre: int, number: int, max_bits: int) -> Hashes:
    """Different hashes within `max_bits` bits of a centre, in random order."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 64, (number * 2, max_bits), dtype=np.uint64)
    hashes = np.unique(np.bitwise_xor.reduce(np.uint64(1) << bits, axis=1) ^ np.uint64(centre))
    return random.permutation(hashes)[:number]


def brute_force(hashes: Hashes, radius: int) -> list[list[int]]:
    values = hashes.tolist()
    return [[i, j] for i, j in combinations(range(len(values)), 2) if (values[i] ^ values[j]).bit_count() <= radius]


def plain_owners(hashes: Hashes, radius: int, num_fixed: int) -> list[int]:
    values, survivors, owners = hashes.tolist(), [], []
    for row, value in enumerate(values):
        near = [survivor for survivor in survivors if (values[survivor] ^ value).bit_count() <= radius]
        owners.append(near[0] if near and row >= num_fixed else row)
        if owners[-1] == row:
            survivors.append(row)
    return owners


@given(crowds(), st.integers(0, 12))
def test_near_pairs_match_brute_force(hashes: Hashes, radius: int) -> None:
    assert near_pairs(hashes, radius).tolist() == brute_force(hashes, radius)


@pytest.mark.parametrize("radius", range(13))
@pytest.mark.parametrize("planned_for", [10**4, 10**6, 10**7])
def test_band_plans_for_large_sets_miss_no_pair(radius: int, planned_for: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = plan_bands(planned_for, radius)
    monkeypatch.setattr(duplicates, "plan_bands", lambda number, radius: bands)
    crowd = np.concatenate([crowd_around(2**64 - 1, 60, 8), crowd_around(0xF0F0 << 24, 60, 6)])
    assert near_pairs(crowd, radius).tolist() == brute_force(crowd, radius)


@pytest.mark.parametrize("radius", range(13))
@pytest.mark.parametrize("number", [0, 1, 1000, 10**5, 10**6, 10**8])
def test_bands_do_not_overlap_and_cover_the_radius(number: int, radius: int) -> None:
    bands = plan_bands(number, radius)
    assert sum(band.flips + 1 for band in bands) == radius + 1
    bits = [bit for band in bands for bit in range(band.shift, band.shift + band.bits)]
    assert len(set(bits)) == len(bits)
    assert set(bits) <= set(range(64))


def test_small_blocks_and_large_buckets_miss_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", 60)
    monkeypatch.setattr(duplicates, "MAX_COLUMNS", 20)
    crowd = crowd_around(0, 150, 5)
    assert near_pairs(crowd, 4).tolist() == brute_force(crowd, 4)


@pytest.mark.parametrize("max_hits", [4, duplicates.MAX_HITS])
@given(crowds(), st.integers(0, 12), st.integers(0, 40))
def test_survivors_match_a_plain_loop_with_any_memory(
    max_hits: int, hashes: Hashes, radius: int, num_fixed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "MAX_HITS", max_hits)
        assert near_owners(hashes, radius, num_fixed).tolist() == plain_owners(hashes, radius, num_fixed)


def test_duplicates_are_compared_with_survivors_only() -> None:
    chain = np.array([0b0, 0b1, 0b11, 0b111, 0b1111], np.uint64)
    assert near_owners(chain, 1).tolist() == [0, 0, 2, 2, 4]


def test_a_dense_group_needs_no_memory_for_its_pairs() -> None:
    crowd = crowd_around(12345, 12_000, 4)
    assert len(crowd) == 12_000
    tracemalloc.start()
    owners = near_owners(crowd, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not owners.any()  # all are within eight bits of the first
    assert peak < 300 << 20  # the pairs alone would be 1.1 GB


TEXTS = st.lists(st.text("ab c", min_size=1, max_size=12), max_size=25)


def test_shingles_are_three_words_without_case_or_punctuation() -> None:
    assert shingles("A red FOX, (asleep).") == {("a", "red", "fox"), ("red", "fox", "asleep")}
    assert shingles("Red fox") == {("red",), ("fox",)}
    assert shingles("狐狸睡覺") == {("狐", "狸", "睡"), ("狸", "睡", "覺")}
    assert shingles("!!!") == {("!!!",)}
    assert shingles(" ") == frozenset()


def test_similarity_is_the_jaccard_index() -> None:
    assert similarity(shingles("a b c d"), shingles("a b c e")) == pytest.approx(1 / 3)
    assert similarity(shingles("a b c"), shingles("A  b c.")) == 1
    assert similarity(shingles(" "), shingles(" ")) == 0


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_pairs_at_the_threshold_become_candidates(threshold: float) -> None:
    rows, bands = plan_minhash(threshold)
    assert 1 - (1 - threshold**rows) ** bands >= 0.999


def test_nearly_all_pairs_above_the_threshold_are_candidates() -> None:
    random = np.random.default_rng(0)
    originals = random.integers(0, 10_000, (500, 30)).astype(str).tolist()
    edited = [[*words[:-2], "else", "where"] for words in originals]
    texts = [" ".join(words) for words in originals + edited]
    sets = [shingles(text) for text in texts]
    assert all(similarity(*pair) >= 0.8 for pair in zip(sets[:500], sets[500:], strict=True))
    bands = bands_of_texts(texts, 0.8)
    assert (bands[:500] == bands[500:]).any(axis=1).sum() >= 498
    assert (bands[:499] == bands[501:]).any(axis=1).sum() == 0


def test_bands_depend_on_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"caption number {number} of many" for number in range(50)]
    whole = bands_of_texts(texts, 0.8)
    monkeypatch.setattr(duplicates, "BATCH", 7)
    assert (bands_of_texts(texts[::-1], 0.8)[::-1] == whole).all()


@given(TEXTS, st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.integers(0, 25))
def test_survivors_among_similar_captions_match_a_plain_loop(
    texts: list[str], threshold: float, num_fixed: int
) -> None:
    sets = [shingles(text) for text in texts]
    survivors: list[int] = []
    expected = []
    for row, words in enumerate(sets):
        similar = [survivor for survivor in survivors if similarity(words, sets[survivor]) >= threshold]
        expected.append(similar[0] if similar and row >= num_fixed else row)
        if expected[-1] == row:
            survivors.append(row)
    owners, degrees = alike_owners(sets, [[0]] * len(sets), threshold, num_fixed)
    assert owners.tolist() == expected
    for row, owner in enumerate(expected):
        assert degrees[row] == (similarity(sets[row], sets[owner]) if owner != row else 1)


def test_only_captions_that_share_a_bucket_are_compared() -> None:
    sets = [shingles("a b c")] * 3
    buckets = group_buckets(np.array([7, 8, 9]), np.array([9, 7, 8, 9]), np.array([1, 1, 2, 3]))
    assert buckets == [[1], [2], [1, 3]]
    assert alike_owners(sets, buckets, 0.9, 0)[0].tolist() == [0, 1, 0]
