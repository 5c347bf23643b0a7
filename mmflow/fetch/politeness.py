"""How a host is spared: so many requests at once, pauses that it asks for, and an end where it gives no answer.

A host is a name, whatever its ports: the limits protect a machine and whoever pays for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import time
from collections import OrderedDict
from collections.abc import Iterator

from mmflow.fetch.robots import Robots
from mmflow.sources.reasons import Reason

FIRST_PAUSE = 1.0  # seconds; doubled at each further try, and drawn from 0 up to that, so that tries do not align
LONGEST_PAUSE = 60.0  # seconds; a host that asks for more is left alone until the next run
# Tries in a row without an answer, or answered "not now", after which a host is left alone until the next run: a dead
# host of a thousand URLs would otherwise hold its tasks for hours.
MISSES = 10
MAX_HOSTS = 4_096  # known at once; those idle for longest are forgotten


class Host:
    """What is known of one host during a run."""

    def __init__(self, per_host: int) -> None:
        self.slots = asyncio.Semaphore(per_host)
        self.robots: dict[str, Robots | tuple[Reason, str]] = {}  # origin → its rules, or why they cannot be had
        self.robots_lock = asyncio.Lock()
        self.users = 0  # URLs under way that may touch it
        self.closed: str | None = None  # why it is left alone
        self._ready = 0.0
        self._misses = 0

    async def pause(self) -> None:
        """Wait for as long as the host asked to be left in peace."""
        while (seconds := self._ready - time.monotonic()) > 0:
            await asyncio.sleep(seconds)

    def answered(self) -> None:
        """Any answer but "not now"."""
        self._misses = 0

    def missed(self, seconds: float | None = None) -> None:
        """No answer, or "not now", perhaps for so many seconds."""
        self._misses += 1
        if seconds is not None and seconds > LONGEST_PAUSE:
            self.closed = f"the host asked for a pause of {seconds:.0f} s"
        elif self._misses >= MISSES:
            self.closed = f"the host gave no answer {MISSES} times in a row"
        elif seconds is not None:
            self._ready = max(self._ready, time.monotonic() + seconds)


class Hosts:
    """The hosts of a run, bounded in number."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: OrderedDict[str, Host] = OrderedDict()

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Host]:
        """A host, which is not forgotten within the block."""
        host = self._hosts.get(name) or self._hosts.setdefault(name, Host(self._per_host))
        self._hosts.move_to_end(name)
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if len(self._hosts) > MAX_HOSTS:
                oldest = next(iter(self._hosts))
                if self._hosts[oldest].users:
                    self._hosts.move_to_end(oldest)
                else:
                    del self._hosts[oldest]


def backoff(tries: int, retry_after: float | None) -> float:
    """Seconds until the next try after so many: full jitter, but no less than the host asked for.

    Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    drawn = random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)))
    return max(drawn, retry_after or 0.0)


def parse_retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date (RFC 9110 10.2.3); None for what is neither."""
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
