"""The promotion gate: what a challenger must show, as settings and as arithmetic alone, so that whoever doubts a
promotion can repeat it with two dicts of numbers.

Every doubt refuses: a metric that is missing or not finite, on either side, fails its check instead of skipping it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from mmflow.core.config import Config

# MLflow refuses "/" and ":" in a registered name, and a quote would end the string in its search filters.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
# 0.55 + 0.02 is 0.5700000000000001 in binary: without this, a challenger at exactly 0.57 would be refused.
ROUNDING = 1e-9
LOWER_IS_BETTER = ("_rank", "_drop", "loss", "perplexity")

Metrics = Mapping[str, float]


class PromoteConfig(Config):
    """Bounds are finite numbers: with a bound of NaN or minus infinity the gate could not refuse."""

    model: ModelName
    """Registered model. The gate decides about its `champion` alias."""
    candidate: Literal["student", "teacher"] = "student"
    """Which of the two new models is the challenger."""
    metric: str = Field(pattern=r"^[^/]+/[^/]+/.+$")
    """The deciding metric, such as `unseen_variants/text_to_image/R@1`. Higher is better, unless its name ends in
    _rank, _drop, loss or perplexity."""
    min_gain: FiniteFloat = 0.0
    """How much better than the champion the challenger must be. 0 promotes an equal; less than 0 tolerates a loss."""
    floors: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Metric → the worst value admitted: the least, or the most for a metric where lower is better."""
    max_drop: dict[str, Annotated[FiniteFloat, Field(ge=0)]] = Field(default_factory=dict)
    """Metric → the most by which it may be worse than the champion's."""


@dataclass(frozen=True)
class Check:
    """One bound that the challenger had to hold. A number is None where there was no finite one."""

    name: str
    challenger: float | None
    threshold: float | None
    passed: bool


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, one reason for each failed check (or why it won), and every check made."""

    promoted: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


def decide(settings: PromoteConfig, challenger: Metrics, champion: Metrics | None) -> Decision:
    """Whether the challenger becomes champion. Without a champion, floors and finite numbers are enough."""
    checks: list[Check] = []
    reasons: list[str] = []

    def check(name: str, value: float | None, threshold: float | None, passed: bool, reason: str) -> None:
        checks.append(Check(name, value, threshold, passed))
        if not passed:
            reasons.append(f"{name}: {reason}")

    for metric in dict.fromkeys([settings.metric, *settings.floors, *settings.max_drop]):
        value = finite(challenger, metric)
        reason = f"the challenger's value {_stated(challenger, metric)}"
        check(f"{metric} is finite", value, None, value is not None, reason)

    for metric, floor in settings.floors.items():
        value = finite(challenger, metric)
        if value is not None:
            side = "most" if lower_is_better(metric) else "least"
            reason = f"{value:.6g}, needed at {side} {floor:.6g}"
            check(f"{metric} floor", value, floor, holds(metric, value, floor), reason)

    if champion is not None:
        bounds = [(settings.metric, "min_gain", settings.min_gain, settings.min_gain)]
        bounds += [(metric, "max_drop", drop, -drop) for metric, drop in settings.max_drop.items()]
        for metric, bound, setting, gain in bounds:
            value, current = finite(challenger, metric), finite(champion, metric)
            if current is None:
                reason = f"the champion's value {_stated(champion, metric)}; evaluate the champion again"
                check(f"{metric} {bound}", value, None, False, reason)
            elif value is not None:
                threshold = current - gain if lower_is_better(metric) else current + gain
                reason = (
                    f"{value:.6g} against the champion's {current:.6g}, needed {threshold:.6g} ({bound} {setting:g})"
                )
                check(f"{metric} {bound}", value, threshold, holds(metric, value, threshold), reason)

    if reasons:
        return Decision(False, tuple(reasons), tuple(checks))
    against = "there is no champion yet" if champion is None else f"the champion has {champion[settings.metric]:.6g}"
    return Decision(True, (f"{settings.metric} {challenger[settings.metric]:.6g}, {against}",), tuple(checks))


def lower_is_better(metric: str) -> bool:
    """Ranks, losses and perplexities fall as a model improves; every other metric rises."""
    return metric.endswith(LOWER_IS_BETTER)


def finite(metrics: Metrics, metric: str) -> float | None:
    """The metric's value; None if it is missing or not a finite number."""
    value: object = metrics.get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _stated(metrics: Metrics, metric: str) -> str:
    return f"is {metrics[metric]!r}, not a finite number" if metric in metrics else "is missing"


def holds(metric: str, value: float, threshold: float) -> bool:
    """Whether the value is as good as the threshold, within rounding. False for a threshold of NaN or infinity."""
    if not math.isfinite(threshold):
        return False
    allowance = ROUNDING * max(1.0, abs(threshold))
    return value <= threshold + allowance if lower_is_better(metric) else value >= threshold - allowance
