"""A journal in an object store: it goes on, it is followed, and the store may be away."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from mmflow.core import storage
from mmflow.core.storage import write_bytes
from mmflow.training import journal
from mmflow.training.journal import appended, followed, journal_at, read_journal

URI = "s3://bucket/training/journal.jsonl"


class Store:
    """An object store in memory, which may be away."""

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
    for module in (storage, journal):
        monkeypatch.setattr(module, "filesystem", store.filesystem)
    monkeypatch.setattr(journal, "BRING_SECONDS", 0.05)
    monkeypatch.setattr(journal, "LAST_PAUSES", (0.01,))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield store
    store.system.delete_dir_contents("/", accept_root_dir=True)


def test_a_journal_in_a_store_goes_on_where_an_earlier_run_was_killed(store: Store) -> None:
    assert journal_at(URI) == []
    write_bytes(URI, b'{"step": 1, "time": 0.0, "event": "started"}\n{"step": 2, "ti')
    with appended(URI) as (journal, bring):
        journal.event(1, "started")
        bring()
        assert store.steps() == [1, 1]
        journal.metrics(3, {"loss": 1.0})
    assert store.steps() == [1, 1, 3]
    assert list(Path(tempfile.gettempdir()).glob("mmflow-*/*")) == []


def test_a_journal_in_a_store_is_followed_as_it_grows(store: Store) -> None:
    with appended(URI) as (journal, bring):
        journal.event(0, "started")
        bring()
        with followed(URI) as (path, fetch):
            assert len(list(read_journal(path))) == 1
            journal.metrics(1, {"loss": 2.0})
            deadline = time.monotonic() + 10
            while len(list(read_journal(path))) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            journal.metrics(2, {"loss": 1.0})
            bring()
            fetch()
            assert list(read_journal(path)) == journal_at(URI)
            assert store.steps() == [0, 1, 2]


def test_a_store_that_is_away_ends_no_training_and_is_told_of_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with appended(URI) as (journal, bring):
        store.is_away = True
        journal.metrics(1, {"loss": 2.0})
        bring()
        bring()
        store.is_away = False
    assert store.steps() == [1]
    with appended(URI) as (journal, _):
        journal.metrics(2, {"loss": 1.0})
        store.is_away = True
    store.is_away = False
    assert store.steps() == [1]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "the journal waits: no answer",
        "the journal waits: no answer",
        "the store did not answer; the journal's last lines were not copied",
    ]
