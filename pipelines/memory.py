"""The most memory that this process and its children held together."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

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
        total = 0
        with contextlib.suppress(psutil.Error):
            for process in [me, *me.children(recursive=True)]:
                total += _proportional_bytes(process)
        _peak = max(_peak, total)


def _proportional_bytes(process: psutil.Process) -> int:
    """The process's own pages and its share of those it shares (PSS): a sum of resident sizes would count Ray's
    object store once for each process that maps it."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    except (OSError, StopIteration):
        with contextlib.suppress(psutil.Error):
            return int(process.memory_info().rss)
        return 0
