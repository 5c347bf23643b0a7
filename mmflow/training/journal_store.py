"""A training's journal where it lies: on a disk, or in an object store, which cannot append.

There rank 0 writes a file of its own, which is brought to the store as it grows, and whoever reads along follows it by
a copy.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmflow.core.artifacts import (
    exists,
    filesystem,
    local_path,
    positioned_reader,
    read_bytes,
    scratch_directory,
    write_bytes,
)
from mmflow.core.errors import MmflowError
from mmflow.training.telemetry import Journal, parsed

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
