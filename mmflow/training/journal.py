"""The journal of a training: one JSON line an interval, on a disk or in an object store.

Lines are {"step", "time", "metrics"} or {"step", "time", "event"}. Rank 0 appends them to a local file, so that no
tracking server can delay a step. A run that resumes appends to the same journal: a step that was run twice is there
twice, with the same loss, and readers keep the last. An object store cannot append: there the local file is copied to
the store as it grows, and readers follow it by a copy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmflow.core.errors import MmflowError
from mmflow.core.storage import (
    exists,
    filesystem,
    local_path,
    positioned_reader,
    read_bytes,
    scratch_directory,
    write_bytes,
)

COPY_SECONDS = 10.0  # between two copies to an object store, or from it
LAST_PAUSES = (1.0, 4.0, 10.0)  # before the last copy gives up on a store that does not answer

log = logging.getLogger(__name__)


class Journal:
    """Appends whole lines, each visible to readers at once. Without a path nothing is written: on all ranks but 0."""

    def __init__(self, path: Path | None = None) -> None:
        self.flush: Callable[[], object] = lambda: None
        """Copies all lines to where the journal is kept, if that is not the path."""
        self._descriptor: int | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # cut off by a kill: keep it off the next line
            os.write(self._descriptor, b"\n")

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Means over the interval that ends with `step`."""
        self._append({"step": step, "time": time.time(), "metrics": dict(metrics)})

    def event(self, step: int, event: str, **details: Any) -> None:
        """Something that happened before the step after `step`: a start, a restart, a checkpoint."""
        self._append({"step": step, "time": time.time(), "event": event, **details})

    def _append(self, line: dict[str, Any]) -> None:
        # One write of one line: with O_APPEND a kill cuts at most one line, the last.
        if self._descriptor is not None:
            os.write(self._descriptor, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)


# --- reading --------------------------------------------------------------------------------------------------------


def journal_at(uri: str) -> list[dict[str, Any]]:
    """The lines of the journal at a URI, oldest first; none where there is no journal."""
    return list(_parsed(read_bytes(uri).split(b"\n"))) if exists(uri) else []


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines' values, without a line that a kill cut off."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Metric → [(step, value), …] in order of steps, the last value of each step."""
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.get("metrics", {}).items():
            points.setdefault(name, {})[line["step"]] = value
    return {name: sorted(by_step.items()) for name, by_step in points.items()}


@contextlib.contextmanager
def watch(path: Path, total_steps: int, report: Callable[[int, int, str], None]) -> Iterator[None]:
    """Report a journal's progress from a thread while the block runs, from the lines written meanwhile: neither an
    earlier run nor this one's start counts in how long it takes."""
    ended = threading.Event()

    def follow(position: int) -> None:
        note = "starting"
        while not ended.wait(1.0):
            # Opened anew each time: a handle that stays open sees what other nodes wrote late on a network disk.
            whole = b""
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                stream.seek(position)
                whole = stream.read().rpartition(b"\n")[0]  # without a line that is not whole yet
            position += len(whole) + bool(whole)
            lines = list(_parsed(whole.split(b"\n")))
            for line in lines:
                metrics = line.get("metrics", {})
                if "loss" in metrics:
                    note = f"loss {metrics['loss']:.3f}, {metrics['samples_per_second']:,.0f} samples/s"
            if lines:
                report(lines[-1]["step"], total_steps, note)

    size = path.stat().st_size if path.exists() else 0
    thread = threading.Thread(target=follow, args=(size,), name="journal-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --- journals in object stores --------------------------------------------------------------------------------------


@contextlib.contextmanager
def appended(uri: str) -> Iterator[Journal]:
    """The journal at a URI, opened to append to."""
    path = local_path(uri)
    if path is not None:
        with contextlib.closing(Journal(path)) as journal:
            yield journal
        return
    with _scratch_file(uri, "appended") as copy:
        if exists(uri):
            copy.write_bytes(read_bytes(uri))
        copied = 0

        def upload() -> None:
            nonlocal copied
            lines = copy.read_bytes()
            if len(lines) > copied:
                write_bytes(uri, lines)
                copied = len(lines)

        with contextlib.closing(Journal(copy)) as journal, _repeated(uri, upload) as journal.flush:
            yield journal


@contextlib.contextmanager
def followed(uri: str) -> Iterator[tuple[Path, Callable[[], object]]]:
    """The journal at a URI as a local file that grows with it, and a function that brings the file up to date now."""
    path = local_path(uri)
    if path is not None:
        yield path, lambda: None
        return
    with _scratch_file(uri, "followed") as copy:
        copy.touch()

        def download() -> None:
            system, remote = filesystem(uri)
            size, copied = system.get_file_info(remote).size or 0, copy.stat().st_size
            if size > copied:  # a journal only grows, so its copied beginning is still right
                with copy.open("ab") as stream:
                    stream.write(positioned_reader(uri)(size - copied, copied))

        with _repeated(uri, download) as now:
            now()  # the lines of an earlier run are not progress
            yield copy, now


@contextlib.contextmanager
def _scratch_file(uri: str, use: str) -> Iterator[Path]:
    """A place on this machine for a copy of the journal at a URI."""
    directory = scratch_directory(uri) / use
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory / "journal.jsonl"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _repeated(uri: str, copy: Callable[[], None]) -> Iterator[Callable[[], object]]:
    """Copy every few seconds, whenever the yielded function is called, and at the end. A store that does not answer is
    tried again the next time: a journal never ends a training."""
    ended, one_at_a_time = threading.Event(), threading.Lock()
    is_away = False

    def now() -> bool:
        nonlocal is_away
        with one_at_a_time:
            try:
                copy()
            except (OSError, MmflowError) as error:
                if not is_away:
                    log.warning("%s: the journal waits: %s", uri, " ".join(str(error).split())[:300])
                is_away = True
                return False
            is_away = False
            return True

    def repeat() -> None:
        pause = COPY_SECONDS
        while not ended.wait(pause):
            began = time.monotonic()
            now()
            pause = max(COPY_SECONDS, 20 * (time.monotonic() - began))  # a long journal takes long to copy

    thread = threading.Thread(target=repeat, name="journal", daemon=True)
    thread.start()
    try:
        yield now
    finally:
        ended.set()
        thread.join()
        for pause in (0.0, *LAST_PAUSES):
            time.sleep(pause)
            if now():
                break
        else:
            log.warning("%s: the store did not answer; the journal's last lines were not copied", uri)
