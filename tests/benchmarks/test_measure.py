"""The benchmarks' tools: turns are taken, failures are told, memory is that of the process that used it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import data, measure, peers
from tests.benchmarks.__main__ import SUBJECTS, main
from tests.benchmarks.build import without_start


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (measure, data):
        monkeypatch.setattr(module, "SCRATCH", tmp_path / "bench")
    return tmp_path / "bench"


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str) -> Any:
        return lambda: float(order.append(name) or len(order))

    found = measure.rounds({name: contestant(name) for name in "ab"}, runs=3)
    assert order == ["a", "b"] * 3
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_a_function_runs_in_a_process_of_its_own_with_arguments_of_any_length() -> None:
    values = ["x" * 100] * 3000
    assert measure.call("json:dumps", obj=values[:1]) == '["' + "x" * 100 + '"]'
    assert len(measure.call("json:dumps", obj=values)) > 300_000


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3\nno such thing"):
        measure.run_command([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"])


def test_memory_is_told_by_process() -> None:
    child = "import time; held = b'x' * 200_000_000; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    peaks = measure.run_command([sys.executable, "-c", parent], watch=True).peaks
    assert sorted(peak > 200_000_000 for _, peak in peaks.values()) == [False, True]


def test_a_share_of_a_set_is_spread_over_it_and_finds_its_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "5.png").write_bytes(b"five")
    data.write(tmp_path / "records.jsonl", [{"key": str(key), "image": f"images/{key}.png"} for key in range(10)])
    assert data.share_of(tmp_path / "records.jsonl", 10) == tmp_path / "records.jsonl"
    share = data.share_of(tmp_path / "records.jsonl", 2)
    assert [record["key"] for record in data.read(share)] == ["0", "5"]
    assert (share.parent / "images/5.png").read_bytes() == b"five"


def test_a_smaller_set_is_repeated_under_other_keys(tmp_path: Path) -> None:
    data.write(tmp_path / "records.jsonl", [{"key": key, "image": f"images/{key}.png"} for key in "ab"])
    records = list(data.read(data.share_of(tmp_path / "records.jsonl", 4)))
    assert [record["image"] for record in records] == ["images/a.png"] * 2 + ["images/b.png"] * 2
    assert len({record["key"] for record in records}) == 4


def test_a_rate_after_the_start_is_that_of_the_rows_between_two_runs() -> None:
    assert measure.rate_after_start(many=(900, 12.0), few=(300, 9.0)) == 200


def test_peers_are_pinned_exactly() -> None:
    lines = [line for pins in peers.PINS.values() for line in pins.read_text().splitlines()]
    assert all("==" in line for line in lines if not line.startswith("#"))
    assert (peers.version("img2dataset"), peers.version("clip_retrieval")) == ("1.47.0", "2.45.0")


def test_an_unknown_subject_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "tarz"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "'tarz' is no subject; there are " + ", ".join(SUBJECTS) in capsys.readouterr().err


def test_a_rate_without_start_is_not_guessed_from_a_run_that_is_mostly_start() -> None:
    assert without_start(5000, 25, 5) == 250
    assert math.isnan(without_start(50, 9, 5))
    assert math.isnan(without_start(50, 4, 5))
