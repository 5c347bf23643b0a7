"""Watching a training: losses that are not finite or spike, and ranks that do not respond."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch.distributed as dist

from mmflow.core.errors import TrainingError
from mmflow.training.config import GuardsConfig
from mmflow.training.journal import Journal

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.01  # of the median: a nearly constant loss has almost no deviation of its own
MOST_BEAT_SECONDS = 20.0
STORE_SECONDS = 5.0
MISSED_BEATS = 3  # after this many, a rank counts as dead or frozen
ACTIVITIES = ("starting", "loading", "computing", "validating", "saving")  # in the order of a step


@dataclass(frozen=True)
class Trouble:
    """Steps with wrong numbers."""

    kind: Literal["nonfinite", "spike", "spoilt"]
    steps: tuple[int, ...]
    message: str


class Rewind(Exception):  # noqa: N818 — not an error: the training continues
    """Go back to the last checkpoint."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


class Guards:
    """Finds steps with wrong losses and decides what happens. Every rank has the same state."""

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        # By task: the losses of one task say nothing about another's.
        self._losses: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=config.spike_window))
        self._rewinds = 0
        self._watched_until = 0
        self.passed_over: frozenset[int] = frozenset()
        """Steps that change no weight, because their batches spiked."""

    def watches(self, step: int) -> bool:
        """Whether the step's gradients are checked before they are used."""
        return self._config.on_nonfinite == "skip" or step <= self._watched_until

    def check(self, losses: Mapping[int, float], tasks: Mapping[int, int]) -> Trouble | None:
        """The trouble in some steps, from their losses over all ranks and their tasks; good losses join the window."""
        nonfinite = [step for step, loss in losses.items() if not math.isfinite(loss)]
        if nonfinite:
            return Trouble("nonfinite", tuple(nonfinite), f"the loss is {losses[nonfinite[0]]}")
        if self._config.on_spike == "ignore":
            return None
        spikes = []
        for step, loss in losses.items():
            window = self._losses[tasks[step]]
            limit = spike_limit(window, self._config.spike_deviations)
            if len(window) >= self._config.spike_window // 2 and loss > limit:
                spikes.append(step)
            else:
                window.append(loss)
        if not spikes:
            return None
        return Trouble("spike", tuple(spikes), f"the loss is {losses[spikes[0]]:.4g}, far above those before it")

    def act(self, trouble: Trouble, advice: str) -> None:
        """Return where the training continues. Raises Rewind, or TrainingError with the advice."""
        policy = self._config.on_spike if trouble.kind == "spike" else self._config.on_nonfinite
        if trouble.kind == "spoilt" and policy == "skip":  # leaving out steps does not repair weights
            policy = "stop"
        if policy == "rewind" and self._rewinds < self._config.max_rewinds:
            raise Rewind(trouble)
        if policy in ("stop", "rewind"):
            after = f" after {self._rewinds} rewinds" if self._rewinds else ""
            raise TrainingError(f"step {trouble.steps[0]}: {trouble.message}{after}; {advice}")

    def rewound(self, trouble: Trouble) -> None:
        """Note a rewind, and what changes on the way back to the trouble."""
        self._rewinds += 1
        self._losses.clear()
        if trouble.kind == "spike":
            # A step's loss comes from the weights that the step before left.
            self.passed_over |= set(trouble.steps) | {trouble.steps[0] - 1}
        else:
            self._watched_until = max(self._watched_until, trouble.steps[-1])

    def state(self) -> dict[str, Any]:
        """What a restart must know, as JSON."""
        return {"rewinds": self._rewinds, "passed_over": sorted(self.passed_over)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of an earlier process."""
        self._rewinds = state["rewinds"]
        self.passed_over = frozenset(state["passed_over"])


def spike_limit(losses: Sequence[float] | deque[float], deviations: float) -> float:
    """The largest loss that is no spike: this many deviations above the median, which a spike does not move."""
    if not losses:
        return math.inf
    median = statistics.median(losses)
    mad = statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(MAD_TO_DEVIATION * mad, LEAST_DEVIATION * abs(median))


# --- ranks that do not respond --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beat:
    """A rank's last report."""

    step: int
    doing: str
    since: float  # UNIX time at which this activity began
    time: float  # UNIX time of the report


class Pulse:
    """Reports from a thread what this rank is doing, so that a hang has a name: in a collective operation all ranks
    wait, and nothing shows which rank they wait for.

    On rank 0 it writes to the journal once when the run makes no progress for half of `hung_after` seconds: the
    timeout that follows ends the process, on an accelerator without a message.
    """

    def __init__(self, hung_after: float, journal: Journal) -> None:
        self._hung_after, self._journal = hung_after, journal
        self._every = min(MOST_BEAT_SECONDS, hung_after / 10)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._here = (0, "starting", time.time())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """This rank begins an activity of a step."""
        self._here = (step, doing, time.time())

    def __enter__(self) -> Self:
        self._report()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(STORE_SECONDS)  # a call to the store can block for half an hour once rank 0 is gone

    def missing(self) -> str:
        """The ranks that the others wait for, in words."""
        beats = {self._rank: Beat(*self._here, time.time())}
        for rank in set(range(self._world_size)) - {self._rank}:
            try:
                if self._store.check([_key(rank)]):
                    beats[rank] = Beat(**json.loads(self._store.get(_key(rank))))
            except RuntimeError:  # rank 0 holds the store
                return "rank 0 is gone"
        return laggards(beats, self._world_size, now=time.time(), dead_after=MISSED_BEATS * self._every)

    def _beat(self) -> None:
        reported = 0.0
        while not self._ended.wait(self._every):
            try:
                self._report()
            except RuntimeError:  # the store is gone with rank 0, and the run with it
                return
            step, _, since = self._here
            if self._rank == 0 and since > reported and time.time() - since > self._hung_after / 2:
                reported = since
                self._journal.event(step, "hung", reason=self.missing())

    def _report(self) -> None:
        self._store.set(_key(self._rank), json.dumps(asdict(Beat(*self._here, time.time()))))


def _key(rank: int) -> str:
    return f"mmflow/pulse/{rank}"


def laggards(beats: Mapping[int, Beat], world_size: int, *, now: float, dead_after: float) -> str:
    """The ranks that are silent, or else those furthest behind, and what they are doing."""
    silent = [rank for rank in range(world_size) if rank not in beats or now - beats[rank].time > dead_after]
    if silent:
        return "; ".join(
            f"rank {rank} has sent nothing for {now - beats[rank].time:.0f} s, since step {beats[rank].step}"
            if rank in beats
            else f"rank {rank} has never sent anything"
            for rank in silent
        )
    progress = {rank: (beat.step, ACTIVITIES.index(beat.doing)) for rank, beat in beats.items()}
    return "; ".join(
        f"rank {rank} is at step {beat.step}, {beat.doing}, for {now - beat.since:.0f} s"
        for rank, beat in sorted(beats.items())
        if progress[rank] == min(progress.values())
    )
