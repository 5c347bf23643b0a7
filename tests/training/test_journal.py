"""The journal: whole lines that can be read at once, after kills and restarts, on disks and in object stores."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from mmflow.core import storage
from mmflow.core.storage import write_bytes
from mmflow.training import journal as journal_module
from mmflow.training.journal import Journal, appended, curves, followed, journal_at, watch

URI = "s3://bucket/training/journal.jsonl"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(path)) as journal:
        yield journal


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A local journal of whole lines, also where the store stands in for every file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in journal_at(str(path))]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    assert steps_in(path) == []
    with opened(path) as journal:
        journal.event(0, "started", epoch=0)
        journal.metrics(10, {"loss": 2.5, "rate": math.nan})
        first, second = journal_at(str(path))  # before it is closed
    assert (first["step"], first["event"], first["epoch"]) == (0, "started", 0)
    assert (second["step"], second["metrics"]) == (10, pytest.approx({"loss": 2.5, "rate": math.nan}, nan_ok=True))
    assert abs(first["time"] - time.time()) < 60


def test_a_line_that_a_kill_cut_off_is_skipped_and_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"step": 10, "metrics": {"loss": 2.5}}\n{"step": 20, "metr')
    assert steps_in(path) == [10]
    with opened(path) as journal:
        journal.event(10, "started")
    with opened(path) as journal:  # a whole last line gets no empty line after it
        journal.metrics(20, {"loss": 1.5})
    assert steps_in(path) == [10, 10, 20]
    assert path.read_bytes().count(b"\n") == 4


def test_curves_keep_the_last_value_of_a_step_in_order_of_steps() -> None:
    lines = [
        {"step": 10, "metrics": {"loss": 3.0, "rate": 0.1}},
        {"step": 20, "metrics": {"loss": 2.0}},
        {"step": 15, "event": "started"},
        {"step": 20, "metrics": {"loss": 1.9}},
        {"step": 12, "metrics": {"loss": 2.8}},
    ]
    assert curves(lines) == {"loss": [(10, 3.0), (12, 2.8), (20, 1.9)], "rate": [(10, 0.1)]}
    assert curves([]) == {}


def test_watch_reports_only_lines_written_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with opened(path) as earlier:
        earlier.metrics(30, {"loss": 2.6, "samples_per_second": 1.0})
    reports: list[tuple[int, int, str]] = []
    with watch(path, 50, lambda done, total, note: reports.append((done, total, note))), opened(path) as journal:
        journal.event(30, "started")
        wait_until(lambda: len(reports) == 1)
        journal.metrics(40, {"loss": 2.5, "samples_per_second": 1234.0})
        journal.event(40, "checkpoint")
        with path.open("a") as stream:
            stream.write('{"step": 41')
        wait_until(lambda: len(reports) == 2)
    assert reports == [(30, 50, "starting"), (40, 50, "loss 2.500, 1,234 samples/s")]


# --- in an object store ---------------------------------------------------------------------------------------------


class Store:
    """An object store in memory, which can stop answering."""

    def __init__(self) -> None:
        self.system = fs.PyFileSystem(fs.FSSpecHandler(__import__("fsspec").filesystem("memory")))
        self.is_away = False

    def filesystem(self, uri: str) -> tuple[fs.FileSystem, str]:
        if self.is_away:
            raise OSError("no answer")
        return self.system, "/" + uri.removeprefix("s3://")

    def steps(self) -> list[int]:
        return [line["step"] for line in journal_at(URI)]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    store = Store()
    for module in (storage, journal_module):
        monkeypatch.setattr(module, "filesystem", store.filesystem)
    monkeypatch.setattr(journal_module, "COPY_SECONDS", 0.05)
    monkeypatch.setattr(journal_module, "LAST_PAUSES", (0.01,))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield store
    store.system.delete_dir_contents("/", accept_root_dir=True)


def test_a_journal_in_a_store_continues_where_an_earlier_run_was_killed(store: Store) -> None:
    assert journal_at(URI) == []
    write_bytes(URI, b'{"step": 1, "time": 0.0, "event": "started"}\n{"step": 2, "ti')
    with appended(URI) as journal:
        journal.event(1, "started")
        journal.flush()
        assert store.steps() == [1, 1]
        journal.metrics(3, {"loss": 1.0})
    assert store.steps() == [1, 1, 3]
    assert list(Path(tempfile.gettempdir()).glob("mmflow-*/*")) == []


def test_a_journal_in_a_store_is_followed_as_it_grows(store: Store) -> None:
    with appended(URI) as journal:
        journal.event(0, "started")
        journal.flush()
        with followed(URI) as (path, fetch):
            assert [line["step"] for line in lines_of(path)] == [0]
            journal.metrics(1, {"loss": 2.0})
            wait_until(lambda: len(lines_of(path)) == 2)
            journal.metrics(2, {"loss": 1.0})
            journal.flush()
            fetch()
            assert lines_of(path) == journal_at(URI)
            assert store.steps() == [0, 1, 2]


def test_a_store_that_does_not_answer_ends_no_training_and_is_reported_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with appended(URI) as journal:
        store.is_away = True
        journal.metrics(1, {"loss": 2.0})
        journal.flush()
        journal.flush()
        store.is_away = False
    assert store.steps() == [1]
    with appended(URI) as journal:
        journal.metrics(2, {"loss": 1.0})
        store.is_away = True
    store.is_away = False
    assert store.steps() == [1]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "the journal waits: no answer",
        "the journal waits: no answer",
        "the store did not answer; the journal's last lines were not copied",
    ]
