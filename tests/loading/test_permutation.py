"""The computed shuffle: a bijection at every size that statistical tests cannot tell from a uniform one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmflow.loading.permutation import key_of, mix, permute, shuffled


def keys(num: int, *numbers: int) -> NDArray[np.uint64]:
    """Keys as unlike as those of windows are."""
    return mix(np.arange(num, dtype=np.uint64) + key_of(*numbers))


def permutations(size: int, num: int, *numbers: int) -> NDArray[np.int64]:
    """(num, size): one permutation a key."""
    elements = np.tile(np.arange(size), num)
    return permute(elements, np.full(num * size, size), np.repeat(keys(num, *numbers), size)).reshape(num, size)


def assert_uniform(counts: NDArray[np.int64], degrees: int) -> None:
    """Chi-square: the sum of squared errors over the expectation has mean `degrees` and variance twice that."""
    expected = counts.sum() / counts.size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees), f"{chi_square:.0f} with {degrees} degrees of freedom"


@given(size=st.integers(1, 3_000), seed=st.integers(0, 2**70))
def test_every_element_has_a_place_of_its_own(size: int, seed: int) -> None:
    places = permute(np.arange(size), np.full(size, size), np.repeat(key_of(seed), size))
    assert places.dtype == np.int64
    assert sorted(places.tolist()) == list(range(size))
    assert sorted(shuffled(size, key_of(seed)).tolist()) == list(range(size))


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=8), seed=st.integers(0, 2**64))
def test_an_element_is_placed_alone_as_among_those_of_other_sizes_and_keys(sizes: list[int], seed: int) -> None:
    elements = np.array([size // 2 for size in sizes])
    together = permute(elements, np.array(sizes), keys(len(sizes), seed))
    for number, size in enumerate(sizes):
        whole = permute(np.arange(size), np.full(size, size), np.repeat(keys(len(sizes), seed)[number], size))
        assert together[number] == whole[size // 2]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_few_elements_are_equally_frequent(size: int) -> None:
    drawn = permutations(size, 24_000)
    _, counts = np.unique(drawn @ 10 ** np.arange(size), return_counts=True)
    assert counts.size == np.prod(np.arange(1, size + 1))
    assert_uniform(counts, counts.size - 1)


@pytest.mark.parametrize(
    "size", [8, 61, 64, 100]
)  # 61 is prime, 64 a whole grid, 8 and 100 have cells to spare or none
def test_an_element_is_placed_everywhere_equally_often(size: int) -> None:
    drawn = permutations(size, 20_000, 1)
    counts = np.stack([np.bincount(drawn[:, element], minlength=size) for element in range(size)])
    assert_uniform(counts, (size - 1) ** 2)


@pytest.mark.parametrize("size", [100, 1_000, 4_096])
@pytest.mark.parametrize("apart", [1, 2, 64])
def test_elements_near_each_other_land_anywhere_apart(size: int, apart: int) -> None:
    """Neighbours in a tar come from one source: a shuffle that moves them together would batch them together."""
    drawn = permutations(size, 400_000 // size, 2)
    distance = (np.roll(drawn, -apart, axis=1) - drawn) % size
    counts = np.bincount(distance.ravel(), minlength=size)
    assert counts[0] == 0
    # The size - 1 distances of a key's permutation are nearly independent of each other.
    assert_uniform(counts[1:], size - 2)


def test_two_elements_go_to_every_pair_of_places_equally_often() -> None:
    drawn = permutations(12, 60_000, 3)
    pairs = np.bincount(drawn[:, 3] * 12 + drawn[:, 4], minlength=144).reshape(12, 12)
    assert np.diag(pairs).sum() == 0
    assert_uniform(pairs[~np.eye(12, dtype=bool)], 12 * 11 - 1)


def test_permutations_of_neighbouring_keys_agree_no_more_than_by_chance() -> None:
    drawn = permutations(1_000, 401, 4)
    agreeing = (drawn[1:] == drawn[:-1]).sum(axis=1)
    assert abs(agreeing.mean() - 1) < 5 / np.sqrt(400)  # Poisson: mean 1, variance 1


def test_keys_follow_the_numbers_and_their_order() -> None:
    keys = {int(key_of(*numbers)[0]) for numbers in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**64 - 1,)]}
    assert len(keys) == 7


def test_the_shuffle_is_a_fixed_function_that_no_release_may_change() -> None:
    """A checkpoint holds a position only: another shuffle after an upgrade would repeat and lose samples."""
    assert int(key_of(7, 1)[0]) == 889264979836180879
    ten = permute(np.arange(10), np.full(10, 10), np.repeat(key_of(7, 1), 10))
    assert " ".join(map(str, ten)) == "6 2 1 7 0 8 3 5 4 9"
    assert shuffled(6, key_of(7, 1)).tolist() == [0, 4, 1, 2, 3, 5]
