"""The journal of a training: one JSON line an interval, appended locally, so that no tracking server can cost a step.

Lines are {"step", "time", "metrics"} or {"step", "time", "event"}. A run that resumes appends to the same journal: a
step that was run twice stands twice, with the same loss, and readers keep the last.
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


BRING_SECONDS = 10.0  # between two looks at what is to be brought to an object store, or from it
LAST_PAUSES = (1.0, 4.0, 10.0)  # before an end gives up a store that does not answer
log = logging.getLogger(__name__)


@contextlib.contextmanager
def appended(uri: str) -> Iterator[tuple[Journal, Callable[[], object]]]:
    """The journal at a URI, to go on with, and how to have the store hold all of it now."""
    path = local_path(uri)
    if path is not None:
        with contextlib.closing(Journal(path)) as journal:
            yield journal, lambda: None
        return
    with _copy_of(uri, "appended") as here:
        if exists(uri):
            here.write_bytes(read_bytes(uri))
        brought = 0

        def bring() -> None:
            nonlocal brought
            lines = here.read_bytes()
            if len(lines) > brought:
                write_bytes(uri, lines)
                brought = len(lines)

        with contextlib.closing(Journal(here)) as journal, _again_and_again(uri, bring) as now:
            yield journal, now


@contextlib.contextmanager
def followed(uri: str) -> Iterator[tuple[Path, Callable[[], object]]]:
    """The journal at a URI as a local file that grows as it does, and how to have it hold all that is there now."""
    path = local_path(uri)
    if path is not None:
        yield path, lambda: None
        return
    with _copy_of(uri, "followed") as here:
        here.touch()

        def fetch() -> None:
            system, place = filesystem(uri)
            size, known = system.get_file_info(place).size or 0, here.stat().st_size
            if size > known:  # what is known is how it still begins
                with here.open("ab") as copy:
                    copy.write(positioned_reader(uri)(size - known, known))

        with _again_and_again(uri, fetch) as now:
            now()  # what an earlier run wrote is no news
            yield here, now


@contextlib.contextmanager
def _copy_of(uri: str, use: str) -> Iterator[Path]:
    """Where a copy of the journal at a URI may lie for a use of it."""
    directory = scratch_directory(uri) / use
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory / "journal.jsonl"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _again_and_again(uri: str, act: Callable[[], None]) -> Iterator[Callable[[], object]]:
    """Act every few seconds, and whenever told to. Where the store of `uri` does not answer it is for the next time,
    and once for the last: no journal ends a training."""
    ended, one_at_a_time = threading.Event(), threading.Lock()
    is_away = False

    def now() -> bool:
        nonlocal is_away
        with one_at_a_time:
            try:
                act()
            except (OSError, MmflowError) as error:
                if not is_away:
                    log.warning("%s: the journal waits: %s", uri, " ".join(str(error).split())[:300])
                is_away = True
                return False
            is_away = False
            return True

    def go_on() -> None:
        pause = BRING_SECONDS
        while not ended.wait(pause):
            began = time.monotonic()
            now()
            pause = max(BRING_SECONDS, 20 * (time.monotonic() - began))  # a long journal takes long to bring

    thread = threading.Thread(target=go_on, name="journal", daemon=True)
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


def journal_at(uri: str) -> list[dict[str, Any]]:
    """The lines of the journal at a URI, oldest first; none where there is no journal."""
    return list(parsed(read_bytes(uri).split(b"\n"))) if exists(uri) else []
