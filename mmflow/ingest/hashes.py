"""What an image looks like in 64 bits, twice: equal only for equal pixels, and near for what looks alike.

Both end in files that other machines compare with, so that both are exact: the perceptual hash counts in whole numbers
that a float64 holds without rounding, whatever the order in which a machine's matrix library adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

CELLS = 32  # sides of the grey picture that the perceptual hash sees
FREQUENCIES = 8  # of each of its axes, from the lowest
LUMA = np.array([77, 150, 29], np.float64)  # Rec. 601 in 256ths
COSINE_ONE = 4096  # 32 · 32 · 4096² · 65280 is below 2⁵³
# Grey levels, in an orthonormal DCT, by which a frequency must pass the median. Drawings are symmetric: half of their
# frequencies are 0, and so is the median; without this gap half of the bits would be the encoder's noise.
GAP = 4.0
GAP_SCALED = GAP * 256 * COSINE_ONE**2 * CELLS / 2


def pixel_hash(rgb: npt.NDArray[np.uint8]) -> int:
    """xxh3_64 of an image's shape and bytes, (height, width, 3) uint8."""
    digest = xxhash.xxh3_64(np.array(rgb.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(rgb).data)
    return int(digest.intdigest())


def clip_pixel_hash(frames: Sequence[int]) -> int:
    """The hash of a clip from its frames' pixel hashes; of a single frame its own."""
    return frames[0] if len(frames) == 1 else int(xxhash.xxh3_64_intdigest(np.array(frames, "<u8").tobytes()))


def perceptual_hash(rgb: npt.NDArray[np.uint8]) -> int:
    """The 64-bit DCT hash of an image (height, width, 3) uint8; 0 for a uniform one, whatever its colour."""
    return thumbnail_hash(thumbnail(rgb))


def thumbnail(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The grey picture of 32×32 cells that the perceptual hash sees: averages of equal areas, in 256ths of a level."""
    height, width = rgb.shape[:2]
    num_rows, row_pixels = _blocks(height)
    num_columns, column_pixels = _blocks(width)
    # (rows, width · 3): sums of whole rows first, which memory bandwidth bounds; everything after them is small
    sums = _sum_of_every(rgb.reshape(height, width * 3)[: num_rows * row_pixels], row_pixels)
    columns = sums.reshape(num_rows, width, 3)[:, : num_columns * column_pixels]
    grey = sum(columns[:, start::column_pixels].astype(np.float64) for start in range(column_pixels)) @ LUMA
    cells = _areas(num_rows) @ grey @ _areas(num_columns).T
    return cells.astype(np.int64) // (num_rows * row_pixels * num_columns * column_pixels)


def thumbnail_hash(cells: npt.NDArray[np.int64]) -> int:
    """The perceptual hash of a thumbnail (32, 32), or of the mean of a clip's thumbnails.

    A bit tells whether a frequency passes the median of the lowest 8×8. The mean brightness is no frequency: its bit
    is 0, so that 63 remain, an odd number, whose median is one of them.
    """
    basis = _cosines()
    spectrum = (basis @ cells.astype(np.float64) @ basis.T).ravel()
    median = np.partition(spectrum[1:], 31)[31]
    bits = spectrum > median + GAP_SCALED
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _blocks(pixels: int) -> tuple[int, int]:
    """How many blocks of how many whole pixels: 32 to 63 blocks, the rest of under a block is left off at the end."""
    block = max(1, pixels // CELLS)
    return pixels // block, block


def _sum_of_every(rows: npt.NDArray[np.uint8], count: int) -> npt.NDArray[Any]:
    """Sums of each `count` rows that follow one another, in the narrowest type that holds them: half the memory."""
    sums: npt.NDArray[Any] = rows[::count].astype(np.uint16 if count <= 257 else np.uint32)
    for start in range(1, count):
        sums += rows[start::count]
    return sums


@lru_cache(maxsize=2 * CELLS)
def _areas(blocks: int) -> npt.NDArray[np.float64]:
    """(32, blocks): how much of each block, in 32nds, lies in each of 32 equal cells; rows add up to `blocks`."""
    cell = np.arange(CELLS)[:, None] * blocks
    block = np.arange(blocks)[None] * CELLS
    shared = np.minimum(cell + blocks, block + CELLS) - np.maximum(cell, block)
    return np.asarray(np.maximum(shared, 0), np.float64)


@lru_cache(maxsize=1)
def _cosines() -> npt.NDArray[np.float64]:
    """(8, 32): the lowest rows of an orthonormal DCT-II, but for a factor, rounded to whole numbers."""
    frequency, cell = np.mgrid[0:FREQUENCIES, 0:CELLS]
    waves = np.cos((2 * cell + 1) * frequency * np.pi / (2 * CELLS))
    waves[0] = np.sqrt(0.5)
    return np.asarray(np.rint(COSINE_ONE * waves), np.float64)
