"""Work done ahead of its reader by a few threads, whose every error reaches the reader of what it concerns."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable

Range = tuple[int, int, int]  # shard, first row, last row
NUM_THREADS = 4  # one remote connection is slower than a node's network
FORGET_SECONDS = 60.0  # a loader asks for the same windows at every batch: they are worked on once, while it does


class ReadAhead:
    """Runs `work(shard, first, last)` for each range that is asked for, in order.

    The threads start with the first range and end with this object.
    """

    def __init__(self, work: Callable[[int, int, int], None]) -> None:
        self.failed: dict[int, BaseException] = {}  # shard → what went wrong with it
        self._asked: dict[Range, float] = {}  # when last, the longest ago first
        self._guard = threading.Lock()
        self._queue: queue.Queue[Range | None] = queue.Queue()
        self._started = False
        # Not bound methods: a thread that held this object would keep it, and every file that it has open, for ever.
        self._loop = (_run, (self._queue, self.failed, work))

    def ask(self, shard: int, first: int, last: int) -> None:
        """Have a range worked on, unless it was asked for of late. Returns at once."""
        wanted, now = (shard, first, last), time.monotonic()
        with self._guard:
            is_new = self._asked.pop(wanted, None) is None
            self._asked[wanted] = now
            while self._asked[oldest := next(iter(self._asked))] < now - FORGET_SECONDS:
                del self._asked[oldest]
            if not is_new:
                return
            if not self._started:
                self._started = True
                target, arguments = self._loop
                for _ in range(NUM_THREADS):
                    threading.Thread(target=target, args=arguments, name="mmflow-read-ahead", daemon=True).start()
                weakref.finalize(self, _end, self._queue)
        self._queue.put(wanted)

    def raise_failure(self, shard: int) -> None:
        """Raise what went wrong with this shard, once: a second try is the reader's own."""
        error = self.failed.pop(shard, None)
        if error is not None:
            with self._guard:
                self._asked = {each: when for each, when in self._asked.items() if each[0] != shard}
            raise error


def _run(
    ranges: queue.Queue[Range | None], failed: dict[int, BaseException], work: Callable[[int, int, int], None]
) -> None:
    while (wanted := ranges.get()) is not None:
        try:
            work(*wanted)
        except BaseException as error:  # whatever it is belongs to the shard's reader
            failed[wanted[0]] = error


def _end(ranges: queue.Queue[Range | None]) -> None:
    for _ in range(NUM_THREADS):
        ranges.put(None)
