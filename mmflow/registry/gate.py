"""The promotion gate as arithmetic alone, so that whoever doubts a promotion can repeat it with two dicts of numbers.

Every doubt refuses: a metric that is missing or not finite, on either side, fails its check instead of skipping it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# 0.55 + 0.02 is 0.5700000000000001 in binary: without this, a challenger at exactly 0.57 would be refused.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Check:
    """One bound that the challenger had to hold. `value` and `threshold` are None where there was no finite number."""

    name: str
    value: float | None
    threshold: float | None
    passed: bool


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, one reason for each failed check (or why it won), and every check made."""

    promoted: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


def lower_is_better(metric: str) -> bool:
    """Ranks, losses and perplexities fall as a model improves; every other metric rises."""
    return metric.endswith(("_rank", "loss", "perplexity"))


def finite(metrics: Mapping[str, float], metric: str) -> float | None:
    """The metric's value, or None where it is missing, not a number, NaN or infinite."""
    value: object = metrics.get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def shown(metrics: Mapping[str, float], metric: str) -> str:
    """What stands in the metrics, for the reason of a check that found no finite number."""
    return f"is {metrics[metric]!r}, not a finite number" if metric in metrics else "is missing"


def holds(metric: str, value: float, threshold: float) -> bool:
    """Whether the value is as good as the threshold, rounding aside. False for a threshold of NaN or infinity."""
    if not math.isfinite(threshold):
        return False
    allowance = ROUNDING * max(1.0, abs(threshold))
    return value <= threshold + allowance if lower_is_better(metric) else value >= threshold - allowance


def decide(
    challenger: Mapping[str, float],
    champion: Mapping[str, float] | None,
    *,
    metric: str,
    min_gain: float,
    floors: Mapping[str, float],
    max_drop: Mapping[str, float],
) -> Decision:
    """Whether the challenger takes the champion's place.

    Args:
        challenger: metric → value of the new model.
        champion: the same for the model in office; None where there is none, and then the challenger needs the floors
            and finite numbers only.
        metric: decides between the two; higher is better unless `lower_is_better`.
        min_gain: how much better than the champion's the challenger's `metric` must be, in the metric's own unit.
        floors: metric → worst value admitted (the least; the most where less is better).
        max_drop: metric → most by which it may be worse than the champion's.
    """
    checks: list[Check] = []
    reasons: list[str] = []

    def check(name: str, value: float | None, threshold: float | None, passed: bool, reason: str) -> None:
        checks.append(Check(name, value, threshold, passed))
        if not passed:
            reasons.append(f"{name}: {reason}")

    for one in dict.fromkeys([metric, *floors, *max_drop]):
        value = finite(challenger, one)
        check(f"{one} is finite", value, None, value is not None, f"the challenger's value {shown(challenger, one)}")

    for one, floor in floors.items():
        value = finite(challenger, one)
        if value is not None:
            side = "most" if lower_is_better(one) else "least"
            check(f"{one} floor", value, floor, holds(one, value, floor), f"{value:.6g}, needed at {side} {floor:.6g}")

    if champion is not None:
        bounds = [(metric, "min_gain", min_gain), *((one, "max_drop", drop) for one, drop in max_drop.items())]
        for one, bound, margin in bounds:
            value, held = finite(challenger, one), finite(champion, one)
            if held is None:
                reason = f"the champion's value {shown(champion, one)}; evaluate the champion again"
                check(f"{one} {bound}", value, None, False, reason)
            elif value is not None:
                better = margin if bound == "min_gain" else -margin
                threshold = held - better if lower_is_better(one) else held + better
                reason = f"{value:.6g} against the champion's {held:.6g}, needed {threshold:.6g} ({bound} {margin:g})"
                check(f"{one} {bound}", value, threshold, holds(one, value, threshold), reason)

    if reasons:
        return Decision(False, tuple(reasons), tuple(checks))
    against = "there is no champion yet" if champion is None else f"the champion has {champion[metric]:.6g}"
    return Decision(True, (f"{metric} {challenger[metric]:.6g}, {against}",), tuple(checks))
