"""Random numbers that belong to a place: the same for a row of the global batch, whichever rank it is on and whatever
its batch is padded to."""

from __future__ import annotations

import torch
from torch import Tensor

# Shapes: B rows of this rank, T tokens, C places in a row.

_LOW_32_BITS = 0xFFFFFFFF


def draw_seed(generator: torch.Generator) -> int:
    """The seed of one draw. Generators in the same state give every rank the same."""
    return int(torch.randint(1 << 32, (), generator=generator, device=generator.device))


def uniform(seed: int, rows_B: Tensor, num_places: int) -> Tensor:
    """(B, C) fp32 in (0, 1), both ends left out: a function of the seed, the row's number and the place alone."""
    places_C = torch.arange(num_places, device=rows_B.device)
    hashed_BC = _scatter(_scatter(_scatter(rows_B) ^ seed)[:, None] ^ _scatter(places_C + 0x9E3779B9))
    # 23 bits and a half: with all 32 the highest would round to 1 in fp32.
    return ((hashed_BC >> 9) + 0.5) * 2.0**-23


def fingerprint(token_ids_BT: Tensor, token_mask_BT: Tensor) -> Tensor:
    """(B,) int64, equal for equal texts whatever they are padded to, and but for chance for no others."""
    places_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    factors_T = (_scatter(places_T) << 32) + _scatter(places_T + (1 << 31))
    return ((token_ids_BT + 1) * factors_T * token_mask_BT).sum(1)


def _scatter(values: Tensor) -> Tensor:
    """A bijection of 32-bit integers under which neighbours part (MurmurHash3's finaliser), held in int64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = values & _LOW_32_BITS
        values = (values ^ (values >> shift)) * factor
    values = values & _LOW_32_BITS
    return values ^ (values >> 16)
