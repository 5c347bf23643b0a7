"""Records from JSONL: each line is a row, and a bad one says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.errors import MisuseError
from mmflow.ingest.reasons import Reason, Rejected
from mmflow.ingest.records import KEY, parse_record, read_jsonl
from mmflow.ingest.sources import source_names

GOOD = {"key": "a-1", "image": "a.png", "captions": [{"language": "en", "text": "a fox"}]}


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_fields_and_metadata() -> None:
    record = parse_record(line(split="test", license="CC0", size={"b": 1, "a": 2}))
    assert record == {
        "key": "a-1",
        "image": "a.png",
        "split": "test",
        "captions": [{"language": "en", "text": "a fox"}],
        "metadata": '{"license":"CC0","size":{"a":2,"b":1}}',
    }
    assert parse_record(line(captions=[{"text": "x"}]))["captions"] == [{"language": "und", "text": "x"}]
    assert parse_record(line())["split"] == "train"


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"key": "a", "image": "a.png", "captions": [{"text": "\\ud800"}]}',
        b"[" * 100_000,
        line(image=None),
        line(key=7),
        line(captions="a fox"),
        line(captions=[1]),
        line(captions=[{"language": "en"}]),
        line(split="Train Set"),
        b'{"key": "a", "image": "a.png", "captions": [], "score": NaN}',
        b'{"key": "a", "image": "a.png"}',
    ],
)
def test_malformed_lines_are_rejected_in_one_line(bad: bytes) -> None:
    with pytest.raises(Rejected) as rejected:
        parse_record(bad)
    assert rejected.value.reason is Reason.record_malformed
    assert "\n" not in rejected.value.detail


@pytest.mark.parametrize("key", ["", "a.b", "../x", "a/b", "A", "x" * 81, "-a", "a b", "ä", "a\n"])
def test_keys_that_tars_cannot_carry_are_rejected(key: str) -> None:
    with pytest.raises(Rejected) as rejected:
        parse_record(line(key=key))
    assert rejected.value.reason is Reason.key_invalid


@given(st.from_regex(KEY, fullmatch=True))
def test_keys_of_the_stated_form_are_kept(key: str) -> None:
    assert parse_record(line(key=key))["key"] == key


def test_rows_number_their_lines_and_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\n\n" + b"nonsense\n" + line(key="b") + b"\r\n" + line(key="c"))
    rows = [row for table in read_jsonl(str(path), "records.jsonl", 3) for row in table.to_pylist()]
    assert [(row["source"], row["key"], row["reason"]) for row in rows] == [
        ("records.jsonl:1", "a-1", None),
        ("records.jsonl:3", None, "record_malformed"),
        ("records.jsonl:4", "b", None),
        ("records.jsonl:5", "c", None),
    ]
    assert [row["place"] - (3 << 40) for row in rows] == [1, 3, 4, 5]
    assert {row["root"] for row in rows} == {str(tmp_path)}


def test_source_names_are_told_apart_without_machine_paths() -> None:
    assert source_names(["/data/x/one.jsonl", "s3://bucket/two.jsonl"]) == ["one.jsonl", "two.jsonl"]
    assert source_names(["/data/x/a.jsonl", "/data/y/a.jsonl"]) == ["x/a.jsonl", "y/a.jsonl"]
    with pytest.raises(MisuseError, match="named twice"):
        source_names(["a.jsonl", "a.jsonl"])
