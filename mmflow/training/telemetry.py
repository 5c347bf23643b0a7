"""The journal of a training: one JSON line an interval, appended locally, so that no tracking server can cost a step.

Lines are {"step", "time", "metrics"} or {"step", "time", "event"}. A run that resumes appends to the same journal: a
step that was run twice stands twice, with the same loss, and readers keep the last.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends whole lines, each visible to readers at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # torn: end it, or it takes the next line with it
            os.write(self._descriptor, b"\n")

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Means over the interval that ends with `step`."""
        self._append({"step": step, "time": time.time(), "metrics": dict(metrics)})

    def event(self, step: int, event: str, **details: Any) -> None:
        """Something that happened before the step after `step`: a start, a restart, a checkpoint."""
        self._append({"step": step, "time": time.time(), "event": event, **details})

    def _append(self, line: dict[str, Any]) -> None:
        # One write of one line: with O_APPEND a kill leaves at most one torn line, at the end.
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, oldest first; a line torn by a kill is passed over."""
    if not path.exists():
        return
    with path.open() as lines:
        yield from parsed(lines)


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Metric → [(step, value), …] in order of steps, the last value of each step."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.get("metrics", {}).items():
            found.setdefault(name, {})[line["step"]] = value
    return {name: sorted(points.items()) for name, points in found.items()}


@contextlib.contextmanager
def watch(path: Path, total_steps: int, report: Callable[[int, int, str], None]) -> Iterator[None]:
    """Report a journal's progress from a thread while the block runs: of what is written from now on, so that neither
    an earlier run nor the start of this one counts in how long it takes."""
    ended = threading.Event()

    def follow(position: int) -> None:
        note = "starting"
        while not ended.wait(1.0):
            lines, position = _lines_after(path, position)
            for line in lines:
                metrics = line.get("metrics", {})
                if "loss" in metrics:
                    note = f"loss {metrics['loss']:.3f}, {metrics['samples_per_second']:,.0f} samples/s"
            if lines:
                report(lines[-1]["step"], total_steps, note)

    now = path.stat().st_size if path.exists() else 0
    thread = threading.Thread(target=follow, args=(now,), name="journal-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lines_after(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines that begin at a byte or after it, and where they end."""
    if not path.exists():
        return [], position
    with path.open("rb") as stream:
        stream.seek(position)
        whole = stream.read().rpartition(b"\n")[0]
    return list(parsed(whole.split(b"\n"))), position + len(whole) + bool(whole)


def parsed(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """What lines of a journal say; one torn by a kill is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
