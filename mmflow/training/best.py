"""The best that a validated metric has been, and when there is no more waiting for better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """Of one training, the same on every rank. A value is better by `least_gain` or not at all: small gains in a row
    count once they add up to it."""

    def __init__(
        self,
        metric: str,
        *,
        highest: bool,
        least_gain: float = 0.0,
        patience: int | None = None,
    ) -> None:
        self._metric, self._sign = metric, 1.0 if highest else -1.0
        self._least_gain, self._patience = least_gain, patience
        self._value: float | None = None
        self._step = 0
        self._since = 0  # validations

    def look(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether a validation is the best so far. One without the metric counts for nothing."""
        if self._metric not in metrics:
            return False
        value = metrics[self._metric]
        gain = math.inf if self._value is None else self._sign * (value - self._value)
        if math.isfinite(value) and gain > 0 and gain >= self._least_gain:
            self._value, self._step, self._since = value, step, 0
            return True
        self._since += 1
        return False

    @property
    def ended(self) -> str | None:
        """Why the training ends, in words; None where it goes on."""
        if self._patience is None or self._since < self._patience:
            return None
        by = f" by {self._least_gain:g}" if self._least_gain else ""
        than = "" if self._value is None else f" than {self._value:.6g} at step {self._step}"
        return f"no better {self._metric}{than}{by} in {self._since} validations"

    def state(self) -> dict[str, Any]:
        """What a restart must know of it, as JSON."""
        return {"metric": self._metric, "value": self._value, "step": self._step, "since": self._since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; from none where it is of another metric."""
        if state.get("metric") == self._metric:
            self._value, self._step, self._since = state["value"], state["step"], state["since"]
