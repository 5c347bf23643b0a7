"""Random numbers that depend on a text alone: the same for any batch, rank, worker or machine that asks."""

from __future__ import annotations

import numpy as np
import xxhash


def generator_of(text: str) -> np.random.Generator:
    """The random numbers of a text that names what they are for, such as "noise 00017"."""
    return np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(text.encode())))
