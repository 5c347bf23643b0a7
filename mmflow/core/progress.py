"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 5.0

Report = Callable[[int, int, str], None]
"""(done, total, note); may be called as often as convenient."""


@contextlib.contextmanager
def progress(title: str) -> Iterator[Report]:
    """A reporter for one piece of work. It writes to standard error."""
    if not sys.stderr.isatty():
        yield _plain(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield report


def _plain(title: str) -> Report:
    began = last = time.monotonic()
    first: int | None = None  # where resumed work began, from which its rate counts
    latest = shown = -1

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal began, last, first, latest, shown
        now = time.monotonic()
        if first is None or done < latest:  # the next of several pieces
            first, began = done, now
        latest = done
        if now - last < LINE_SECONDS or done == shown:
            return
        last, shown = now, done
        advanced = done - first
        left = f", {(total - done) * (now - began) / advanced:,.0f} s left" if advanced > 0 else ""
        print(f"  {title} {done:,}/{total:,}{left}{'  ' + note if note else ''}", file=sys.stderr, flush=True)

    return report
