"""How the learning rate goes: a linear warm-up, then one of three ways down."""

from __future__ import annotations

import math
from collections.abc import Callable

from mmflow.training.config import OptimizerConfig

DECAY_SHARE = 0.2  # of all steps; from a tenth to a fifth matches a cosine (arXiv 2405.18392, section 4)


def learning_rate_schedule(optimizer: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Step → factor of the peak learning rate."""
    warmup = min(optimizer.warmup_steps, total_steps - 1)
    floor = optimizer.final_learning_rate / optimizer.learning_rate
    begin = warmup
    if optimizer.schedule == "wsd":
        begin = max(warmup, total_steps - round((optimizer.decay_share or DECAY_SHARE) * total_steps))
    fall = FALLS[optimizer.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < begin:
            return 1.0
        return floor + (1 - floor) * fall(min(1.0, (step - begin) / max(1, total_steps - begin)))

    return factor


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _one_less_root(progress: float) -> float:
    """Better than a straight line after a stable stretch (arXiv 2405.18392, section 4)."""
    return 1 - math.sqrt(progress)


FALLS = {"cosine": _cosine, "linear": _linear, "wsd": _one_less_root}
"""Share of the fall's time, from 0 to 1 → share of the peak that is left."""
