"""The most memory that this process and its children held together."""

from __future__ import annotations

import contextlib
import threading

import psutil

SAMPLE_SECONDS = 1.0

_peak = 0


def peak_memory() -> int:
    """Bytes, over the time since `watch_memory` was called; 0 where it was not."""
    return _peak


def watch_memory() -> None:
    """Sample from a daemon thread until the process ends."""
    threading.Thread(target=_watch, name="memory-watch", daemon=True).start()


def _watch() -> None:
    global _peak
    me = psutil.Process()
    pause = threading.Event()
    while not pause.wait(SAMPLE_SECONDS):
        private, shared = 0, 0
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                held = process.memory_info()
                mapped = getattr(held, "shared", 0)  # Linux alone tells
                private += held.rss - mapped
                shared = max(shared, mapped)
        # What is shared (libraries, Ray's object store) counts once: a sum of resident sizes would count it for every
        # process, and the exact figure, PSS, costs a tenth of a core to read.
        _peak = max(_peak, private + shared)
