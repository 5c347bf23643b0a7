"""Which frames of a clip a view shows: one of each of equal spans of time (TSN, Wang et al., 1608.00859)."""

from __future__ import annotations

import numpy as np


def choose_frames(total: int, count: int, random: np.random.Generator | None = None) -> list[int]:
    """`count` ascending numbers below `total`, one of each of as many equal spans; all where the clip has no more.

    Where `random` is given, any of its span (training); else the middle (evaluation). A clip that has fewer frames than
    `count` gives fewer numbers: the batch masks the rest. Always draws `count` numbers.
    """
    draws = np.full(count, 0.5) if random is None else random.random(count)
    kept = min(total, count)
    bounds = [number * total // kept for number in range(kept + 1)]
    return [start + int(draw * (end - start)) for start, end, draw in zip(bounds, bounds[1:], draws, strict=False)]
