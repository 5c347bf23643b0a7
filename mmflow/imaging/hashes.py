"""Two 64-bit hashes of an image: one that is equal only for equal pixels, one that is near for images that look alike.

Other machines compare with the stored hashes, so both are exact. The perceptual hash computes with whole numbers that a
float64 holds without rounding, so the order in which a matrix library adds them does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

CELLS = 32  # each side of the grey picture that the perceptual hash is made from
BLOCKS = 2 * CELLS  # an axis is first summed into at least this many blocks of whole pixels
FREQUENCIES = 8  # the lowest of each axis
# Rec. 601 in 128ths. 255 · 128 · 32² · Pillow's 179 megapixels is below 2⁵³, and so is 32² · 4096² · 65280 later on.
LUMA = np.array([38, 75, 15], np.float64)
COSINE_ONE = 4096
# Within this many grey levels of the median, in an orthonormal DCT, a frequency counts as equal to it. Drawings are
# symmetric: half of their frequencies are 0, and so is the median. Without this gap, JPEG of quality 75 flipped up to
# 18 bits in 150 of OpenMoji's drawings.
GAP = 4.0
GAP_SCALED = GAP * 256 * COSINE_ONE**2 * CELLS / 2
# The bit of a frequency that is equal to the median, (8, 8): 1 for half of them in every row, so that being above the
# median shows as often as being below it.
NO_DIFFERENCE = np.add.outer(np.arange(FREQUENCIES), np.arange(FREQUENCIES)) // 2 % 2 == 1


def pixel_hash(rgb: npt.NDArray[np.uint8]) -> int:
    """xxh3_64 of an image's shape and bytes, (height, width, 3) uint8."""
    digest = xxhash.xxh3_64(np.array(rgb.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(rgb).data)
    return int(digest.intdigest())


def clip_pixel_hash(frames: Sequence[int]) -> int:
    """The hash of a clip from its frames' pixel hashes; a single frame keeps its own."""
    return frames[0] if len(frames) == 1 else int(xxhash.xxh3_64_intdigest(np.array(frames, "<u8").tobytes()))


def perceptual_hash(rgb: npt.NDArray[np.uint8]) -> int:
    """The 64-bit DCT hash of an image (height, width, 3) uint8; `UNIFORM` for any single colour."""
    return thumbnail_hash(thumbnail(rgb))


def thumbnail(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The grey picture of 32×32 cells for the perceptual hash: averages of equal areas, in 256ths of a level."""
    height, width = rgb.shape[:2]
    row_weights, row_areas, row_block = _cells(height)
    column_weights, column_areas, column_block = _cells(width)
    num_rows, num_columns = row_weights.shape[1], column_weights.shape[1]
    # (row blocks, width · 3), with a narrower last column block padded by zeros. Summing whole rows is most of the
    # work, so it comes first and uses the narrowest type that holds the sums.
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

    A bit says whether a frequency exceeds the median of the lowest 8×8. The bit of the mean brightness is 0: of the 63
    others, an odd number, the median is one of them.
    """
    basis = _cosines()
    spectrum = (basis @ cells.astype(np.float64) @ basis.T).ravel()
    median = np.partition(spectrum[1:], 31)[31]
    bits = spectrum > median + np.where(NO_DIFFERENCE.ravel(), -GAP_SCALED, GAP_SCALED)
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@lru_cache(maxsize=512)
def _cells(pixels: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], int]:
    """For an axis: (32, blocks) how many 32nds of each block are in each cell; (32,) their sum in pixels; block size.

    The last block may be narrower. Leaving its pixels out changed 5 bits between 256 and 200 pixels.
    """
    block = max(1, pixels // BLOCKS)
    starts = np.arange(0, pixels, block)
    sizes = np.minimum(block, pixels - starts)
    edges = np.arange(CELLS + 1)[:, None] * pixels  # in 32nds of a pixel
    weights = np.diff(np.clip((edges - CELLS * starts) // sizes, 0, CELLS), axis=0)
    return weights.astype(np.float64), weights @ sizes, block


@lru_cache(maxsize=1)
def _cosines() -> npt.NDArray[np.float64]:
    """(8, 32): the lowest rows of an orthonormal DCT-II, up to a factor, rounded to whole numbers."""
    frequency, cell = np.mgrid[0:FREQUENCIES, 0:CELLS]
    waves = np.cos((2 * cell + 1) * frequency * np.pi / (2 * CELLS))
    waves[0] = np.sqrt(0.5)
    return np.asarray(np.rint(COSINE_ONE * waves), np.float64)


UNIFORM = thumbnail_hash(np.zeros((CELLS, CELLS), np.int64))
