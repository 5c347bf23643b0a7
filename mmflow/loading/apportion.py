"""How many samples of a batch each dataset of a mixture gives: whole numbers that stay within one of the shares asked.

Rounding every batch alone drifts, and giving to whoever lags most lets a dataset lag by more than one sample where
there are many or where the weights change. This is the chairman assignment problem; R. Tijdeman (Discrete Mathematics
32, 1980) proves that k datasets can be kept within 1 - 1/(2k-2) at any weights, by giving to whoever would first be
too late (so a dataset whose weight falls to 0 may give one sample more). All arithmetic is in whole numbers, so that
every rank and machine deals the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmflow.core.errors import RecipeError
from mmflow.loading.config import MixtureConfig

WHOLE = 2**40
"""The sum of the shares. A share is exact to 1e-12: after 10^11 samples a dataset is off by a tenth of one."""


@dataclass(frozen=True)
class Stage:
    """Shares that hold from a step on, to the next stage's."""

    step: int
    shares: tuple[int, ...]  # one a dataset, of WHOLE


@dataclass(frozen=True)
class Segment:
    """A stage on the line of samples."""

    first: int  # samples dealt before it
    owed: tuple[int, ...]  # what each dataset should have given by then, in samples times WHOLE
    shares: tuple[int, ...]


def stages(config: MixtureConfig, samples: Sequence[int]) -> tuple[Stage, ...]:
    """The weights of a mixture step by step; `samples` has one number a dataset, the stage's own first.

    Weights change at once at the step that the curriculum names, never gradually: what a batch holds can be read off
    the recipe. Raises RecipeError where weight is put on a dataset without samples.
    """
    weights: Sequence[float]
    if config.weighting == "fixed":
        weights = config.weights
    else:
        # Of the largest, lest a low temperature's power should overflow.
        exponent = 1.0 if config.weighting == "proportional" else 1 / config.temperature
        weights = [(number / max(1, *samples)) ** exponent for number in samples]
    changes = {0: weights, **{change.step: change.weights for change in config.curriculum}}
    for step, each in changes.items():
        for number, (weight, size) in enumerate(zip(each, samples, strict=True)):
            if weight and not size:
                raise RecipeError(
                    f"loader.mixture: weight {weight:g} from step {step} on for dataset {number} (0 is the stage's "
                    "own), whose split has no samples; name a split that has some, or weigh it 0"
                )
        if not any(each):
            raise RecipeError("loader.mixture: no dataset of it has samples in its split; name splits that have some")
    return tuple(Stage(step, to_shares(each)) for step, each in changes.items())


def to_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as whole shares of WHOLE, what is left over going to the largest remainders."""
    total = math.fsum(weights)
    exact = [weight / total * WHOLE for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: WHOLE - sum(shares)]:
        shares[number] += 1
    return tuple(shares)


def timeline(stages: Sequence[Stage], global_batch_size: int) -> tuple[Segment, ...]:
    """The stages on the line of samples, with what is owed at the start of each."""
    segments = [Segment(0, (0,) * len(stages[0].shares), stages[0].shares)]
    for stage in stages[1:]:
        first = stage.step * global_batch_size
        segments.append(Segment(first, _owed(segments[-1], first), stage.shares))
    return tuple(segments)


def apportion(
    segments: Sequence[Segment], drawn: Sequence[int], dealt: int, key: str = "loader.mixture"
) -> tuple[int, ...]:
    """What each dataset has given when `dealt` samples are dealt in all, `drawn` being what each gave until now.

    Raises RecipeError naming `key` where `drawn` is not of these weights: it lies too far from what they ask.
    """
    owed = _owed(next(segment for segment in reversed(segments) if segment.first <= dealt), dealt)
    # Both bounds of what a dataset may have given, |given - owed| <= 1 - 1/parts, times parts to stay whole numbers.
    parts = max(2, 2 * len(drawn) - 2)
    slack = (parts - 1) * WHOLE
    most = [(parts * each + slack) // (parts * WHOLE) for each in owed]
    least = [-((slack - parts * each) // (parts * WHOLE)) for each in owed]
    given = [max(each, before) for each, before in zip(least, drawn, strict=True)]
    left = dealt - sum(given)
    may_give = [number for number, each in enumerate(given) if each < most[number]]
    if not 0 <= left <= len(may_give):
        asked = [round(each / WHOLE) for each in owed]
        raise RecipeError(
            f"{key}: the checkpoint drew {list(drawn)} of each, these weights ask for {asked} by now; resume with the "
            "weights and the batch size that it was trained with"
        )

    def latest(number: int) -> float:
        """Samples dealt in all when the next of this dataset must have been given."""
        limit = (parts * (given[number] + 1) - 1) * WHOLE // parts
        for segment, end in zip(segments, [*(each.first for each in segments[1:]), math.inf], strict=True):
            share, before = segment.shares[number], segment.owed[number]
            if share and segment.first + (limit - before) // share < end:
                return segment.first + (limit - before) // share
        return math.inf

    for number in sorted(may_give, key=latest)[:left]:
        given[number] += 1
    return tuple(given)


def _owed(segment: Segment, dealt: int) -> tuple[int, ...]:
    return tuple(
        before + share * (dealt - segment.first) for before, share in zip(segment.owed, segment.shares, strict=True)
    )
