"""How far each rank is, so that a hang has a name: in a collective all ranks wait, and none says for whom."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType

import torch.distributed as dist

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
