"""When a checkpoint is written: every so many steps, every so many minutes, and before a node is taken away.

The clock and the question of a node are rank 0's, and all ranks hear of them with the numbers of a journal's line: an
exchange of their own would cost every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

PREEMPTION = "preemption"
BEST = "best"  # a validation's word, not the clock's
ASK_EVERY_SECONDS = 5.0  # as often as Ray itself looks which nodes are to go


class Due:
    """Decides together on all ranks. `preempted` says whether a node that this run is on is to go; collective."""

    def __init__(
        self, *, every_steps: int, every_minutes: float | None, preempted: Callable[[], bool] = lambda: False
    ) -> None:
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._preempted, self._is_saved = preempted, False
        self._last_saved = self._last_asked = time.monotonic()

    def is_regular(self, step: int) -> bool:
        """Whether the steps' number alone asks for one."""
        return step % self._every_steps == 0

    def signals(self) -> dict[str, float]:
        """What rank 0 says to all: 1 for yes."""
        now = time.monotonic()
        minutes = (now - self._last_saved) / 60
        return {
            "old": float(self._every_minutes is not None and minutes >= self._every_minutes),
            "ask": float(now - self._last_asked >= ASK_EVERY_SECONDS),
        }

    def reason(self, step: int, signals: Mapping[str, float]) -> str | None:
        """Why one is due now, if one is. All ranks call it with what rank 0 said."""
        preempted = False
        if signals["ask"]:
            self._last_asked = time.monotonic()
            # Once: the node may stay for minutes, and each checkpoint would delay the last.
            preempted = self._preempted() and not self._is_saved
            self._is_saved |= preempted
        if preempted:
            reason = PREEMPTION
        elif self.is_regular(step):
            reason = "steps"
        elif signals["old"]:
            reason = "minutes"
        else:
            return None
        self._last_saved = time.monotonic()
        return reason
