"""Embeddings in blocks whose similarities are computed a tile at a time, so that memory does not grow with rows²."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

# Shapes: R rows, W the width of the embeddings, T rows of a block, C columns of a tile.

Embeddings = Tensor | NDArray[np.floating[Any]]

ON_CPU = 1024  # rows of a block: tiles of 4 MiB stay in the cache while they are counted
ON_GPU = 8192
SIDE = 16


class Blocks:
    """Embeddings of any float type, on a device, as blocks of float32 that all have `size` rows.

    Tiles of one shape, a multiple of `SIDE` a side, give equal pairs equal scores wherever they stand. A product of
    another shape may add in another order, and ties would be decided by rounding.
    """

    def __init__(
        self,
        rows_RW: Embeddings,
        *,
        tile: int | None = None,
        device: torch.device | str | None = None,
        order_R: NDArray[np.integer] | None = None,
        at_least: int = 1,
    ) -> None:
        """Of `tile` rows or fewer, rounded up to a multiple of `SIDE`. The device is that of the tensor by default, the
        rows come in `order_R`, and there are `at_least` so many blocks if there are enough rows."""
        if isinstance(rows_RW, np.ndarray):
            rows_RW = torch.from_numpy(np.require(rows_RW, requirements=["W"]))
        self._rows = rows_RW.detach().to(device)
        self._order = None if order_R is None else torch.from_numpy(order_R).to(self._rows.device)
        num_rows = len(self._rows)
        tile = tile or (ON_CPU if self.device.type == "cpu" else ON_GPU)
        num_blocks = max(1, at_least, -(-num_rows // tile))
        self.size = max(1, -(-num_rows // (num_blocks * SIDE))) * SIDE
        self.bounds = [(start, min(start + self.size, num_rows)) for start in range(0, max(1, num_rows), self.size)]

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self._rows.device

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, number: int) -> Tensor:
        """(T, W) float32: the rows of a block; the last block ends in zeros."""
        rows = slice(*self.bounds[number])
        block = self._rows[rows if self._order is None else self._order[rows]].float()
        return pad(block, (0, 0, 0, self.size - len(block))) if len(block) < self.size else block


class Buffer:
    """Memory for one tile after another: a fresh tile would be paged in anew each time, at the price of counting it."""

    def __init__(self, device: torch.device) -> None:
        self._numbers = torch.empty(0, device=device)

    def view(self, num_rows: int, num_columns: int) -> Tensor:
        """(T, C) float32 with any values; the view before it has the same memory."""
        if num_rows * num_columns > len(self._numbers):
            self._numbers = self._numbers.new_empty(num_rows * num_columns)
        return self._numbers[: num_rows * num_columns].view(num_rows, num_columns)


def similarity_tile(rows_TW: Tensor, columns_CW: Tensor, buffer: Buffer) -> Tensor:
    """(T, C) float32 scalar products, valid until the buffer is used again."""
    return torch.mm(rows_TW, columns_CW.T, out=buffer.view(len(rows_TW), len(columns_CW)))
