"""Fields, keys and chunks, which all kinds of sources share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.sources.config import FieldsConfig, SourceConfig
from mmflow.sources.fields import fields_of, parse_object
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import (
    BYTES_PER_CHUNK,
    KEY,
    ROWS_PER_CHUNK,
    Fields,
    Record,
    Unit,
    attempt,
    key_of,
    place_of,
    respell,
    row_of,
    tables_of,
)
from tests.sources.reading import read

GOOD = {"key": "a-1", "image": "a.png", "captions": [{"language": "en", "text": "a fox"}]}
SOURCE = SourceConfig(uri="x.jsonl")
UNIT = Unit(source=3, number=5, kind="jsonl", name="x.jsonl", uri="/data")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["key", "image", "images", "captions", "caption", "text", "split", "url", "license", "x"])


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def row(record: bytes, **settings: Any) -> dict[str, Any]:
    """The row of a line of JSONL."""
    source = SourceConfig(uri="x.jsonl", **settings)
    return row_of(Record("x.jsonl:1", parse(record, source)), source, "/data")


def parse(line: bytes, source: SourceConfig) -> Fields | Rejected:
    return attempt(lambda: fields_of(parse_object(line), source.fields))


def test_our_own_format_is_read() -> None:
    assert row(line(split="test", license="CC0", size={"b": 1, "a": 2})) == {
        "source": "x.jsonl:1",
        "root": "/data",
        "key": "a-1",
        "images": ["a.png"],
        "bodies": None,
        "split": "test",
        "captions": [{"language": "en", "text": "a fox"}],
        "metadata": '{"license":"CC0","size":{"a":2,"b":1}}',
    }
    assert row(line())["split"] is None


@pytest.mark.parametrize(
    ("record", "images", "captions"),
    [
        ({"url": "https://a.b/c.jpg", "TEXT": "a fox"}, ["https://a.b/c.jpg"], ["a fox"]),
        ({"file_name": "c.jpg", "text": "a fox"}, ["c.jpg"], ["a fox"]),
        ({"filepath": "/d/c.jpg", "title": "a fox"}, ["/d/c.jpg"], ["a fox"]),
        ({"image_path": "c.jpg", "alt": "a fox"}, ["c.jpg"], ["a fox"]),
        ({"images": ["1.jpg", "2.jpg"], "caption": ["a", "b"]}, ["1.jpg", "2.jpg"], ["a", "b"]),
        ({"image": {"path": "c.jpg", "bytes": None}, "caption": {"text": "a"}}, ["c.jpg"], ["a"]),
        ({"image": "c.jpg", "captions": [], "caption": "a", "alt": "b"}, ["c.jpg"], ["a"]),
        ({"image": "", "url": "file:///d/c.jpg", "caption": None}, ["file:///d/c.jpg"], []),
    ],
)
def test_common_column_names_are_recognised(record: dict[str, Any], images: list[str], captions: list[str]) -> None:
    fields = fields_of(record, FieldsConfig())
    assert list(fields.images) == images
    assert [text for _, text in fields.captions] == captions


def test_configured_fields_take_precedence_over_common_names() -> None:
    names = FieldsConfig(key="id", image="photo", captions={"zh": "zh", "title": "en"}, split="part")
    record = {"id": 7, "photo": "p.jpg", "image": "no", "title": "fox", "zh": ["狐"], "caption": "no", "part": "Test"}
    fields = fields_of(record, names)
    assert (fields.key, fields.split, list(fields.images)) == ("7", "test", ["p.jpg"])
    assert list(fields.captions) == [("zh", "狐"), ("en", "fox")]
    assert fields.metadata == {"image": "no", "caption": "no"}


def test_captions_without_a_language_get_the_language_of_the_source() -> None:
    record = line(captions=["ein Fuchs", {"text": "noch einer"}, {"text": "a fox", "language": "en"}])
    assert [caption["language"] for caption in row(record, language="de")["captions"]] == ["de", "de", "en"]
    assert row(line(captions="x"))["captions"] == [{"language": "und", "text": "x"}]


def test_records_without_a_license_get_the_license_of_the_source() -> None:
    assert json.loads(row(line(), license="CC0")["metadata"]) == {"license": "CC0"}
    assert json.loads(row(line(license="MIT"), license="CC0")["metadata"]) == {"license": "MIT"}


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"key": "a", "image": "a.png", "caption": "\xc3\x28"}',
        b'{"key": "a", "image": "a.png", "captions": [{"text": "\\ud800"}]}',
        b'{"key": "a", "image": "\\udfff.png", "captions": []}',
        b"[" * 100_000,
        line(key=[1]),
        line(key=True),
        line(image=7),
        line(images=["a.png", 7]),
        line(captions=[1]),
        line(captions=[{"language": "en"}]),
        line(captions=[{"language": 1, "text": "x"}]),
        line(split="Train Set"),
        line(split=["train"]),
        b'{"key": "a", "image": "a.png", "captions": [], "score": NaN}',
    ],
)
def test_malformed_lines_are_rejected_with_a_short_message(bad: bytes) -> None:
    rejected = row(bad)
    assert rejected["reason"] == Reason.record_malformed
    assert "\n" not in rejected["detail"]
    assert len(rejected["detail"]) <= 300


def test_a_record_without_an_image_lists_its_columns() -> None:
    rejected = row(b'{"key": "a", "picture": "a.png"}')
    assert (rejected["reason"], rejected["key"]) == (Reason.image_missing, "a")
    assert "key, picture" in rejected["detail"]
    assert "fields.image" in rejected["detail"]
    assert "`photo`" in row(line(), fields={"image": "photo"})["detail"]


@given(st.dictionaries(NAMES, JSON, max_size=6))
def test_any_json_object_becomes_a_valid_arrow_row(record: dict[str, Any]) -> None:
    (table,) = tables_of([Record("x.jsonl:1", parse(json.dumps(record).encode(), SOURCE))], SOURCE, UNIT)
    (row,) = table.to_pylist()
    if row["reason"] is None:
        assert KEY.fullmatch(row["key"])
        assert row["images"]
        json.loads(row["metadata"])
    else:
        assert row["reason"] in set(Reason)


@given(st.binary(max_size=200))
def test_any_bytes_become_a_row(text: bytes) -> None:
    result = row(text.replace(b"\n", b""))
    assert result.get("reason") is not None or result["images"]


@pytest.mark.parametrize("key", ["a.b", "../x", "a/b", "A", "x" * 81, "-a", "a b", "ä", "a\n", "_x"])
def test_keys_that_tars_cannot_hold_are_respelled_or_rejected(key: str) -> None:
    assert row(line(key=key), keys="strict")["reason"] == Reason.key_invalid
    kept = row(line(key=key))
    assert KEY.fullmatch(kept["key"])
    assert json.loads(kept["metadata"])["source_key"] == key


def test_an_empty_key_counts_as_missing() -> None:
    assert row(line(key=""))["key"] == row(line(key=None))["key"] == respell("x.jsonl:1")


def test_respelled_keys_stay_readable() -> None:
    assert respell("../Cats/Tom.JPG").startswith("cats-tom-jpg-")
    assert len(respell("x" * 1000)) == 77


@given(st.lists(st.text() | st.from_regex(KEY, fullmatch=True), unique=True, max_size=20))
def test_respelled_keys_are_valid_and_stay_different(keys: list[str]) -> None:
    spelled = [key_of(None, key, "strict") for key in keys]
    assert all(KEY.fullmatch(key) for key in spelled)
    assert len(set(spelled)) == len(keys)
    valid = [key for key in keys if KEY.fullmatch(key)]
    for policy in ("strict", "normalize"):
        assert [key_of(key, "x", policy) for key in valid] == valid


def test_the_weight_samples_records_by_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line(key=f"k{number}") for number in range(2000)))
    rows = read(path, weight=0.25)
    kept = {row["key"] for row in rows if row["reason"] is None}
    assert 400 < len(kept) < 600
    assert {row["reason"] for row in rows} == {None, Reason.not_sampled}
    path.write_bytes(b"\n".join(line(key=f"k{number}") for number in reversed(range(2000))))
    assert {row["key"] for row in read(path, weight=0.25) if row["reason"] is None} == kept
    assert kept < {row["key"] for row in read(path, weight=0.5) if row["reason"] is None}


def test_chunks_are_bounded_in_rows_and_bytes() -> None:
    small = [Record(f"x:{number}", Fields(images=["a.png"])) for number in range(ROWS_PER_CHUNK + 1)]
    large = [Record(f"y:{number}", Fields(bodies=[bytes(BYTES_PER_CHUNK // 2)])) for number in range(5)]
    tables = list(tables_of(small + large, SOURCE, UNIT))
    assert [table.num_rows for table in tables] == [ROWS_PER_CHUNK, 2, 1, 1, 1, 1]
    places = [place for table in tables for place in table["place"].to_pylist()]
    assert places == sorted(places)
    assert places[0] == 3 << 52 | 5 << 28


@pytest.mark.parametrize("numbers", [(1 << 11, 0, 0), (0, 1 << 24, 0), (0, 0, 1 << 28)])
def test_a_place_that_cannot_be_counted_is_refused(numbers: tuple[int, int, int]) -> None:
    assert place_of((1 << 11) - 1, (1 << 24) - 1, (1 << 28) - 1) == (1 << 63) - 1
    with pytest.raises(ValueError, match="split the source"):
        place_of(*numbers)
