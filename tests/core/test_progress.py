"""Where nobody watches a terminal, a line every few seconds says how far long work is and what is left of it."""

from __future__ import annotations

import pytest

from mmflow.core import progress


def test_what_is_left_counts_from_where_each_piece_of_work_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    report = progress._plain("corpus")
    for seconds, done, total, note in (
        (100, 40, 100, "first"),  # resumed at 40
        (10, 50, 100, "first"),
        (200, 1, 30, "second"),  # begun after a download
        (10, 11, 30, "second"),
        (1, 12, 30, "second"),  # too soon for a line
    ):
        now += seconds
        report(done, total, note)
    assert capsys.readouterr().err.splitlines() == [
        "  corpus 40/100  first",
        "  corpus 50/100, 50 s left  first",
        "  corpus 1/30  second",
        "  corpus 11/30, 19 s left  second",
    ]
