"""The journal: whole lines, readable while they are written, through kills and restarts."""

from __future__ import annotations

import math
import time
from pathlib import Path

from mmflow.training.journal import Journal, curves, read_journal, watch


def test_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    journal.event(0, "started", epoch=0)
    journal.metrics(10, {"loss": 2.5})
    lines = list(read_journal(path))  # before it is closed
    assert [(line["step"], line.get("event"), line.get("metrics")) for line in lines] == [
        (0, "started", None),
        (10, None, {"loss": 2.5}),
    ]
    assert lines[0]["epoch"] == 0
    assert abs(lines[0]["time"] - time.time()) < 60
    journal.close()


def test_a_journal_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path / "absent")) == []


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.metrics(10, {"loss": 2.5})
    journal.metrics(20, {"loss": 2.0})
    journal.close()
    path.write_bytes(path.read_bytes()[:-8])
    assert [line["step"] for line in read_journal(path)] == [10]


def test_a_torn_line_does_not_take_the_restart_s_first_line_with_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"step": 10, "metrics": {"loss": 2.5}}\n{"step": 20, "metr')
    journal = Journal(path)
    journal.event(10, "started")
    journal.close()
    again = Journal(path)  # and a whole last line gets no empty one behind it
    again.metrics(20, {"loss": 1.5})
    again.close()
    assert [line["step"] for line in read_journal(path)] == [10, 10, 20]
    assert path.read_bytes().count(b"\n") == 4


def test_curves_keep_the_last_value_of_a_step_in_order_of_steps() -> None:
    lines = [
        {"step": 10, "metrics": {"loss": 3.0, "rate": 0.1}},
        {"step": 20, "metrics": {"loss": 2.0}},
        {"step": 30, "metrics": {"loss": math.nan}},
        {"step": 15, "event": "started"},
        {"step": 20, "metrics": {"loss": 1.9}},
        {"step": 12, "metrics": {"loss": 2.8}},
    ]
    found = curves(lines[:2] + lines[3:])
    assert found == {"loss": [(10, 3.0), (12, 2.8), (20, 1.9)], "rate": [(10, 0.1)]}
    assert math.isnan(curves(lines)["loss"][-1][1])
    assert curves([]) == {}


def test_not_a_number_survives_the_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.metrics(1, {"loss": math.nan})
    journal.close()
    assert math.isnan(next(iter(read_journal(tmp_path / "journal.jsonl")))["metrics"]["loss"])


def test_watch_reports_what_is_written_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    earlier = Journal(path)
    earlier.metrics(30, {"loss": 2.6, "samples_per_second": 1.0})
    earlier.close()
    reports: list[tuple[int, int, str]] = []

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 10
        while len(reports) < number and time.monotonic() < deadline:
            time.sleep(0.02)

    with watch(path, 50, lambda done, total, note: reports.append((done, total, note))):
        journal = Journal(path)
        journal.event(30, "started")
        wait_for(1)
        journal.metrics(40, {"loss": 2.5, "samples_per_second": 1234.0})
        journal.event(40, "checkpoint")
        with path.open("a") as torn:
            torn.write('{"step": 41')
        wait_for(2)
    journal.close()
    assert reports == [(30, 50, "starting"), (40, 50, "loss 2.500, 1,234 samples/s")]
