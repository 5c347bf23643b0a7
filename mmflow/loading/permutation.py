"""A shuffle of [0, n) that is computed, not stored: each element costs the same to find.

A checkpoint's position points into the order of samples, so that order may never change. NumPy's generators may draw
other numbers in a new release; these integer operations cannot.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the step from one
# state to the next, and the multipliers of its finaliser.
STEP = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
WORD = 2**64 - 1
HALF = np.uint64(32)
ROUNDS = 12
"""In a chi-square test over 24,000 permutations of five elements, 8 rounds are not uniform and 12 are. For eight or
more elements, 8 rounds are enough."""


def mix(words: Words) -> Words:
    """SplitMix64's finaliser, a bijection of 64-bit words in which every bit depends on every other; (n,) to (n,)."""
    words = (words ^ (words >> np.uint64(30))) * MULTIPLIER_1
    words = (words ^ (words >> np.uint64(27))) * MULTIPLIER_2
    return words ^ (words >> np.uint64(31))


def key_of(*numbers: int) -> Words:
    """A hash of these integers in this order, (1,)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix((key + STEP) ^ np.uint64(number & WORD))
    return key


ROUND_KEYS = tuple(key_of(number) for number in range(ROUNDS))


def shuffled(num: int, key: Words) -> Ints:
    """A whole permutation of [0, num) as an array (num,); `key` is (1,)."""
    # `mix` is a bijection, so no two words are equal and sorting has no ties.
    return np.argsort(mix(np.arange(num, dtype=np.uint64) * STEP + key))


def permute(elements: Ints, sizes: Ints, keys: Words) -> Ints:
    """The place of each element of [0, size) under its key's permutation of [0, size); all (n,).

    A Feistel network over a grid of at least `size` cells, applied again to cells that land at `size` or beyond (Black
    and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3). The grid is nearly square, so
    fewer than one cell in √size lies beyond. Sizes must be below 2^52, where floats are still exact integers.
    """
    width = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    size = sizes.astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    cells = _encipher(elements.astype(np.uint64), width, height, keys)
    while (beyond := np.flatnonzero(cells >= size)).size:
        cells[beyond] = _encipher(cells[beyond], width[beyond], height[beyond], keys[beyond])
    return cells.astype(np.int64)


def _encipher(cells: Words, width: Words, height: Words, keys: Words) -> Words:
    """One pass of the network over cells of [0, width · height); all (n,)."""
    rows = cells // width
    columns = cells - rows * width
    for number, round_key in enumerate(ROUND_KEYS):
        # In turn, each coordinate moves around its side by a number that depends on the other coordinate alone. Moving
        # it back undoes that, so this is a bijection whatever the number is.
        if number % 2:
            rows = _moved(rows, columns, height, keys ^ round_key)
        else:
            columns = _moved(columns, rows, width, keys ^ round_key)
    return rows * width + columns


def _moved(coordinates: Words, others: Words, side: Words, words: Words) -> Words:
    """The coordinates moved by a hash of the others and the words; (n,). `words` is overwritten.

    Half as many operations as `mix` and in place, because a seek spends its time here. Only the upper half of a word is
    used, and the upper bits of a product depend on all lower bits of its factors.
    """
    words += others
    words *= MULTIPLIER_1
    words ^= words >> HALF
    words *= MULTIPLIER_2
    words >>= HALF
    # A number below 2^32 times the side, shifted by 32 bits, is a number below the side, without a division.
    words *= side
    words >>= HALF
    words += coordinates
    # Where words < side, the unsigned subtraction wraps around to a huge number.
    moved: Words = np.minimum(words, words - side)
    return moved
