"""JSONL and CSV: a bad line is one rejected record, and the lines around it are still read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.sources import jsonl_csv
from mmflow.sources.reasons import Reason
from tests.sources.reading import read, reasons, texts


def test_jsonl_rows_carry_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    good = b'{"key": "a", "image": "a.png", "caption": "x"}'
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + b"nonsense\n" + good + b"\r\n" + good)
    rows = read(path)
    assert reasons(rows) == {
        "records.jsonl:1": None,
        "records.jsonl:3": "record_malformed",
        "records.jsonl:4": None,
        "records.jsonl:5": None,
    }
    assert {row["root"] for row in rows} == {str(tmp_path)}


def test_an_overlong_line_is_one_malformed_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_csv, "MAX_LINE_BYTES", 100)
    good = b'{"image": "a.png"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b"x" * 1000 + b"\n" + good)
    rows = read(tmp_path / "a.jsonl")
    assert [row["reason"] for row in rows] == [None, "record_malformed", None]
    assert "1001 bytes" in rows[1]["detail"]


def test_csv_cells_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('image,caption,artist\nb.png,"one\ntwo, ""three""",Ann\n\nc.png,four,\n')
    first, second = read(path, license="CC0")
    assert (first["source"], first["images"], texts(first)) == ("a.csv:2", ["b.png"], ['one\ntwo, "three"'])
    assert first["metadata"] == {"artist": "Ann", "license": "CC0"}
    assert (second["source"], second["metadata"]) == ("a.csv:5", {"artist": "", "license": "CC0"})


@pytest.mark.parametrize(
    ("name", "delimiter", "bom"), [("a.tsv", "\t", b""), ("a.csv", ";", b"\xef\xbb\xbf"), ("a.csv", "|", b"")]
)
def test_delimiters_and_byte_order_marks_are_detected(tmp_path: Path, name: str, delimiter: str, bom: bytes) -> None:
    (tmp_path / name).write_bytes(bom + delimiter.join(["url", "title"]).encode() + b"\r\nhttp://a/b.jpg")
    (tmp_path / name).open("ab").write(delimiter.encode() + b"a, b\r\n")
    (row,) = read(tmp_path / name)
    assert (row["images"], texts(row)) == (["http://a/b.jpg"], ["a, b"])


def test_bad_csv_lines_do_not_affect_their_neighbours(tmp_path: Path) -> None:
    lines = [
        b"image,caption",
        b"a.png,fine",
        b"b.png,one,too many",
        b"c.png",
        b'd.png,"never closed',
        b"e.png,fine",
        b'"f.png"x,after the quote',
        b"g.png,\xff\xfe",
        b"h.png," + b"x" * 1_000_000,
        b'i.png,"closed by the next',
        b'j.png,fine"',
        b"k.png,fine",
    ]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "a.csv")
    bad = {row["source"].partition(":")[2] for row in rows if row["reason"]}
    assert all(row["reason"] in (None, "record_malformed") for row in rows)
    assert {"3", "4", "5", "7", "8"} <= bad
    assert {row["images"][0] for row in rows if not row["reason"]} >= {"a.png", "e.png", "h.png", "k.png"}
    assert len(texts(next(row for row in rows if row["images"] == ["h.png"]))[0]) == 1_000_000


def test_an_unclosed_quote_takes_bounded_time(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\n" + 'a.png,"open\n' + "b.png,fine\n" * 5000)
    rows = read(tmp_path / "a.csv")
    assert [row["reason"] for row in rows] == ["record_malformed"] + [None] * 5000


def test_a_csv_without_an_image_column_rejects_every_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("picture,caption\na.png,x\nb.png,y\n")
    rows = read(tmp_path / "a.csv")
    assert [row["reason"] for row in rows] == [Reason.image_missing] * 2
    assert "picture, caption" in rows[0]["detail"]
    assert [row["images"] for row in read(tmp_path / "a.csv", fields={"image": "picture"})] == [["a.png"], ["b.png"]]


@given(st.lists(st.sampled_from([b'{"image":"a.png"}', b"{", b"", b" ", b"\xff", b"null", b"[]"]), max_size=20))
def test_every_line_except_blank_ones_is_a_row(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert [row["source"] for row in read(path)] == [
        f"a.jsonl:{number}" for number, line in enumerate(lines, 1) if line.strip()
    ]


@given(st.lists(st.lists(st.text(max_size=12), min_size=2, max_size=2), max_size=8))
def test_csv_written_by_the_standard_library_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]
) -> None:
    cells = [[f"{number}.png", text.replace("\0", "")] for number, (_, text) in enumerate(cells)]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows([["image", "caption"], *cells])
    rows = read(path)
    assert [(row["images"], texts(row)) for row in rows] == [
        ([image], [caption] if caption else []) for image, caption in cells
    ]
