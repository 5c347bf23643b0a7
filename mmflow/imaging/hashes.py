"""What an image looks like in 64 bits, twice: equal only for equal pixels, and near for what looks alike.

Both end in files that other machines compare with, so that both are exact: the perceptual hash counts in whole numbers
that a float64 holds without rounding, whatever the order in which a machine's matrix library adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

CELLS = 32  # sides of the grey picture that the perceptual hash sees
BLOCKS = 2 * CELLS  # at least so many blocks of whole pixels are summed before anything else is done
FREQUENCIES = 8  # of each of its axes, from the lowest
# Rec. 601 in 128ths. 255 · 128 · 32² · Pillow's 179 megapixels are below 2⁵³, as are 32² · 4096² · 65280 further down.
LUMA = np.array([38, 75, 15], np.float64)
COSINE_ONE = 4096
# Grey levels, in an orthonormal DCT, within which a frequency counts as no different from the median. Drawings are
# symmetric: half of their frequencies are 0, and so is the median. Without this gap JPEG of quality 75 turned up to 18
# bits of 150 of OpenMoji's drawings.
GAP = 4.0
GAP_SCALED = GAP * 256 * COSINE_ONE**2 * CELLS / 2
# The bit that says so, (8, 8): a 1 for half of them, and of every row's signs, so that more shows as much as less.
NO_DIFFERENCE = np.add.outer(np.arange(FREQUENCIES), np.arange(FREQUENCIES)) // 2 % 2 == 1


def pixel_hash(rgb: npt.NDArray[np.uint8]) -> int:
    """xxh3_64 of an image's shape and bytes, (height, width, 3) uint8."""
    digest = xxhash.xxh3_64(np.array(rgb.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(rgb).data)
    return int(digest.intdigest())


def clip_pixel_hash(frames: Sequence[int]) -> int:
    """The hash of a clip from its frames' pixel hashes; of a single frame its own."""
    return frames[0] if len(frames) == 1 else int(xxhash.xxh3_64_intdigest(np.array(frames, "<u8").tobytes()))


def perceptual_hash(rgb: npt.NDArray[np.uint8]) -> int:
    """The 64-bit DCT hash of an image (height, width, 3) uint8; `UNIFORM` for one without structure, of any colour."""
    return thumbnail_hash(thumbnail(rgb))


def thumbnail(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The grey picture of 32×32 cells that the perceptual hash sees: averages of equal areas, in 256ths of a level."""
    height, width = rgb.shape[:2]
    row_weights, row_areas, row_block = _cells(height)
    column_weights, column_areas, column_block = _cells(width)
    num_rows, num_columns = row_weights.shape[1], column_weights.shape[1]
    # (row blocks, width · 3), a narrower last column block made up with zeros. Whole rows are summed first, which is
    # most of the work, in the narrowest type that holds them; all that comes after it is small.
    dtype = np.uint16 if row_block <= 257 else np.uint32
    sums = np.zeros((num_rows, num_columns * column_block * 3), dtype)
    rows = rgb.reshape(height, width * 3)
    for start in range(row_block):
        part = rows[start::row_block]
        sums[: len(part), : width * 3] += part.astype(dtype)
    blocks = sums.reshape(num_rows * num_columns, column_block * 3).astype(np.float64)
    grey = (blocks @ np.tile(LUMA, column_block)).reshape(num_rows, num_columns)
    cells = row_weights @ grey @ column_weights.T
    return 2 * cells.astype(np.int64) // np.outer(row_areas, column_areas)


def thumbnail_hash(cells: npt.NDArray[np.int64]) -> int:
    """The perceptual hash of a thumbnail (32, 32), or of the mean of a clip's thumbnails.

    A bit tells whether a frequency passes the median of the lowest 8×8. The mean brightness is no frequency: its bit
    is 0, so that 63 remain, an odd number, whose median is one of them.
    """
    basis = _cosines()
    spectrum = (basis @ cells.astype(np.float64) @ basis.T).ravel()
    median = np.partition(spectrum[1:], 31)[31]
    bits = spectrum > median + np.where(NO_DIFFERENCE.ravel(), -GAP_SCALED, GAP_SCALED)
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@lru_cache(maxsize=512)
def _cells(pixels: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], int]:
    """Of an axis: (32, blocks) how many 32nds of each block lie in each cell, (32,) those in pixels, pixels a block.

    The last block is narrower where it must be. To leave its pixels out cost 5 bits between 256 and 200 pixels.
    """
    block = max(1, pixels // BLOCKS)
    starts = np.arange(0, pixels, block)
    sizes = np.minimum(block, pixels - starts)
    edges = np.arange(CELLS + 1)[:, None] * pixels  # in 32nds of a pixel
    weights = np.diff(np.clip((edges - CELLS * starts) // sizes, 0, CELLS), axis=0)
    return weights.astype(np.float64), weights @ sizes, block


@lru_cache(maxsize=1)
def _cosines() -> npt.NDArray[np.float64]:
    """(8, 32): the lowest rows of an orthonormal DCT-II, but for a factor, rounded to whole numbers."""
    frequency, cell = np.mgrid[0:FREQUENCIES, 0:CELLS]
    waves = np.cos((2 * cell + 1) * frequency * np.pi / (2 * CELLS))
    waves[0] = np.sqrt(0.5)
    return np.asarray(np.rint(COSINE_ONE * waves), np.float64)


UNIFORM = thumbnail_hash(np.zeros((CELLS, CELLS), np.int64))
