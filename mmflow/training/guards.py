"""What watches the numbers of a training, and what becomes of those that are wrong."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from mmflow.core.errors import TrainingError
from mmflow.training.config import GuardsConfig

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.01  # of the median: a loss that hardly moves has a deviation of nothing


@dataclass(frozen=True)
class Trouble:
    """Steps whose numbers are wrong."""

    kind: Literal["nonfinite", "spike", "spoilt"]
    steps: tuple[int, ...]
    what: str


class Rewind(Exception):  # noqa: N818 — not an error: the training goes on
    """Go on from the last checkpoint."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.what)
        self.trouble = trouble


class Guards:
    """What is known of a run's troubles, the same on every rank."""

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        # By task: the losses of one are no measure of another's.
        self._losses: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=config.spike_window))
        self._rewinds = 0
        self._watched_until = 0
        self.passed_over: frozenset[int] = frozenset()
        """Steps that change no weight, because their batches spiked."""

    def watches(self, step: int) -> bool:
        """Whether the step's gradients are looked at before they are used."""
        return self._config.on_nonfinite == "skip" or step <= self._watched_until

    def look(self, losses: Mapping[int, float], tasks: Mapping[int, int] | None = None) -> Trouble | None:
        """The trouble of some steps, by their losses over all ranks and their tasks; sound ones join the window."""
        bad = [step for step, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            return Trouble("nonfinite", tuple(bad), f"the loss is {losses[bad[0]]}")
        if self._config.on_spike == "ignore":
            return None
        high = []
        for step, loss in losses.items():
            before = self._losses[tasks[step] if tasks else 0]
            limit = spike_limit(before, self._config.spike_deviations)
            if len(before) >= self._config.spike_window // 2 and loss > limit:
                high.append(step)
            else:
                before.append(loss)
        if not high:
            return None
        return Trouble("spike", tuple(high), f"the loss is {losses[high[0]]:.4g}, far above those before it")

    def act(self, trouble: Trouble, advice: str) -> None:
        """Return where the training goes on. Raises Rewind, or TrainingError with the advice."""
        policy = self._config.on_spike if trouble.kind == "spike" else self._config.on_nonfinite
        if trouble.kind == "spoilt" and policy == "skip":
            policy = "stop"
        if policy == "rewind" and self._rewinds < self._config.max_rewinds:
            raise Rewind(trouble)
        if policy in ("stop", "rewind"):
            after = f" after {self._rewinds} rewinds" if self._rewinds else ""
            raise TrainingError(f"step {trouble.steps[0]}: {trouble.what}{after}; {advice}")

    def rewound(self, trouble: Trouble) -> None:
        """What to do otherwise on the way back to where the trouble was."""
        self._rewinds += 1
        self._losses.clear()
        if trouble.kind == "spike":
            # A loss is of the weights that the step before left.
            self.passed_over |= set(trouble.steps) | {trouble.steps[0] - 1}
        else:
            self._watched_until = max(self._watched_until, trouble.steps[-1])

    def state(self) -> dict[str, Any]:
        """What a restart must know of it, as JSON."""
        return {"rewinds": self._rewinds, "passed_over": sorted(self.passed_over)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What an earlier process knew."""
        self._rewinds = state["rewinds"]
        self.passed_over = frozenset(state["passed_over"])


def spike_limit(losses: Sequence[float] | deque[float], deviations: float) -> float:
    """The loss above which one is a spike: so many deviations above the median, which a spike does not move."""
    if not losses:
        return math.inf
    median = statistics.median(losses)
    mad = statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(MAD_TO_DEVIATION * mad, LEAST_DEVIATION * abs(median))


MOST_BEAT_SECONDS = 20.0
STORE_SECONDS = 5.0
MISSED_BEATS = 3  # after which a rank is taken for dead or frozen


@dataclass(frozen=True)
class Beat:
    """What a rank last said."""

    step: int
    doing: str
    since: float  # UNIX time at which it began to
    said: float  # UNIX time


class Pulse:
    """Says from a thread where this rank is, and on rank 0 calls `tell` once when the run stands still for half of
    `hung_after` seconds: the time-out that follows ends the process, on an accelerator without a word."""

    def __init__(self, hung_after: float, tell: Callable[[int, str], None]) -> None:
        self._hung_after, self._tell = hung_after, tell
        self._every = min(MOST_BEAT_SECONDS, hung_after / 10)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._here = (0, "starting", time.time())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    @property
    def step(self) -> int:
        """The step that this rank is at."""
        return self._here[0]

    def at(self, step: int, doing: str) -> None:
        """This rank begins to do something of a step."""
        self._here = (step, doing, time.time())

    def __enter__(self) -> Pulse:
        self._say()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(STORE_SECONDS)  # a store whose rank 0 is gone may keep it for half an hour

    def missing(self) -> str:
        """Whom the others wait for, in words."""
        beats = {}
        for rank in range(self._world_size):
            if rank == self._rank:
                beats[rank] = Beat(*self._here, time.time())
                continue
            try:
                if self._store.check([_key(rank)]):
                    beats[rank] = Beat(**json.loads(self._store.get(_key(rank))))
            except RuntimeError:  # rank 0 holds the store
                return "rank 0 is gone"
        return laggards(beats, self._world_size, now=time.time(), dead_after=MISSED_BEATS * self._every)

    def _beat(self) -> None:
        told = 0.0
        while not self._ended.wait(self._every):
            try:
                self._say()
            except RuntimeError:  # the store went with rank 0, and the run with it
                return
            since = self._here[2]
            if self._rank == 0 and since > told and time.time() - since > self._hung_after / 2:
                told = since
                self._tell(self.step, self.missing())

    def _say(self) -> None:
        self._store.set(_key(self._rank), json.dumps(asdict(Beat(*self._here, time.time()))))


def _key(rank: int) -> str:
    return f"mmflow/pulse/{rank}"


def laggards(beats: Mapping[int, Beat], world_size: int, *, now: float, dead_after: float) -> str:
    """The ranks that are silent, or else those that are furthest behind, and what they do there."""
    silent = [rank for rank in range(world_size) if rank not in beats or now - beats[rank].said > dead_after]
    if silent:
        return "; ".join(
            f"rank {rank} has not been heard of for {now - beats[rank].said:.0f} s, since step {beats[rank].step}"
            if rank in beats
            else f"rank {rank} was never heard of"
            for rank in silent
        )
    order = ("starting", "loading", "computing", "validating", "saving")
    behind = min((beat.step, order.index(beat.doing)) for beat in beats.values())
    return "; ".join(
        f"rank {rank} stands at step {beat.step}, {beat.doing}, for {now - beat.since:.0f} s"
        for rank, beat in sorted(beats.items())
        if (beat.step, order.index(beat.doing)) == behind
    )
