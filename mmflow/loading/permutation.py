"""A shuffle of [0, n), for any n, that is computed and not stored: an element costs the same wherever it lies.

NumPy may change what its generators draw from one release to the next. These integer operations never change, nor does
the order of samples into which a checkpoint's position points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the step from one
# state to the next, and the multipliers of its finaliser.
STEP = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
WORD = 2**64 - 1
HALF = np.uint64(32)
ROUNDS = 12
"""A chi-square test over 24,000 permutations of five elements finds 8 rounds not uniform, 12 it cannot tell; from eight
elements on 8 would do."""


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words, every bit of which depends on every other; (n,) to (n,)."""
    words = (words ^ (words >> np.uint64(30))) * MULTIPLIER_1
    words = (words ^ (words >> np.uint64(27))) * MULTIPLIER_2
    return words ^ (words >> np.uint64(31))


def key_of(*numbers: int) -> NDArray[np.uint64]:
    """One word, (1,), that stands for these integers in this order."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix((key + STEP) ^ np.uint64(number & WORD))
    return key


ROUND_KEYS = tuple(key_of(number) for number in range(ROUNDS))


def shuffled(num: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A permutation of [0, num) as an array (num,), where the whole of it is wanted; `key` is (1,)."""
    # `mix` is a bijection, so no two words are equal and the order needs no rule for ties.
    return np.argsort(mix(np.arange(num, dtype=np.uint64) * STEP + key))


def permute(elements: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each element of [0, size) goes under the permutation of [0, size) that its key stands for; all (n,).

    A Feistel network over a grid of at least `size` cells, applied again to what lands beyond `size` (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3). The grid is as square as it can be,
    so that fewer than one cell in √size lies beyond. Sizes are below 2^52, the last whole numbers of a float.
    """
    width = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    size = sizes.astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    cells = _encipher(elements.astype(np.uint64), width, height, keys)
    while (beyond := np.flatnonzero(cells >= size)).size:
        cells[beyond] = _encipher(cells[beyond], width[beyond], height[beyond], keys[beyond])
    return cells.astype(np.int64)


def _encipher(
    cells: NDArray[np.uint64], width: NDArray[np.uint64], height: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """One pass of the network over cells of [0, width · height); all (n,)."""
    rows = cells // width
    columns = cells - rows * width
    for number, round_key in enumerate(ROUND_KEYS):
        # In turn, each coordinate is moved round its side by a number that depends on the other alone: undone by moving
        # it back, hence a bijection whatever that number is.
        if number % 2:
            rows = _moved(rows, columns, height, keys ^ round_key)
        else:
            columns = _moved(columns, rows, width, keys ^ round_key)
    return rows * width + columns


def _moved(
    coordinates: NDArray[np.uint64], others: NDArray[np.uint64], side: NDArray[np.uint64], words: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """The coordinates moved by what the others and the words say; (n,). `words` is overwritten.

    Half as long as `mix` and in place, because a seek spends its time here: only the upper half of a word is used, and
    the bits of a product depend on all the lower ones of its factors.
    """
    words += others
    words *= MULTIPLIER_1
    words ^= words >> HALF
    words *= MULTIPLIER_2
    words >>= HALF
    # A number below 2^32 times the side, halved, is a number below the side without a division.
    words *= side
    words >>= HALF
    words += coordinates
    # Below the side, the subtraction wraps to a number far above it.
    moved: NDArray[np.uint64] = np.minimum(words, words - side)
    return moved
