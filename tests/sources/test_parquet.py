"""Parquet, Hugging Face datasets on disk and img2dataset's output, written by their own tools."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from mmflow.core.errors import MisuseError
from mmflow.sources import parquet as parquet_source
from mmflow.sources.config import FieldsConfig, SourceConfig
from mmflow.sources.sources import list_units
from tests.sources.reading import read, reasons, texts


def parquet(path: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **settings)


@pytest.mark.parametrize(
    ("image", "images", "bodies"),
    [
        ("a/b.jpg", ["a/b.jpg"], None),
        ("https://h/b.jpg", ["https://h/b.jpg"], None),
        (b"\xff\xd8body", None, [b"\xff\xd8body"]),
        ({"bytes": b"body", "path": "b.jpg"}, None, [b"body"]),
        ({"bytes": None, "path": "b.jpg"}, ["b.jpg"], None),
        ([b"one", b"two"], None, [b"one", b"two"]),
        ([{"bytes": b"one", "path": None}], None, [b"one"]),
    ],
)
def test_paths_and_bodies_of_images_in_parquet(tmp_path: Path, image: Any, images: Any, bodies: Any) -> None:
    parquet(tmp_path / "part-0.parquet", [{"key": 7, "image": image, "caption": ["x", "y"]}])
    (row,) = read(tmp_path / "part-0.parquet")
    assert (row["source"], row["key"], row["images"], row["bodies"]) == ("part-0.parquet:1", "7", images, bodies)
    assert texts(row) == ["x", "y"]


def test_values_without_a_json_type_are_converted(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)
    row = {"image": "a", "when": when, "score": float("nan"), "blob": b"\xff", "day": when.date()}
    parquet(tmp_path / "a.parquet", [row])
    assert read(tmp_path / "a.parquet")[0]["metadata"] == {
        "when": "2024-02-29T12:00:00+00:00",
        "score": None,
        "blob": "/w==",
        "day": "2024-02-29",
    }


def test_row_groups_are_units_with_continuous_row_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_source, "BYTES_PER_UNIT", 1)
    monkeypatch.setattr(parquet_source, "ROWS_PER_READ", 2)
    parquet(tmp_path / "a.parquet", [{"image": f"{n}.jpg"} for n in range(12)], row_group_size=5)
    units = list_units([SourceConfig(uri=str(tmp_path / "a.parquet"))])
    assert [(unit.row_groups, unit.records) for unit in units] == [((0, 1), 5), ((1, 2), 5), ((2, 3), 2)]
    assert len({unit.fingerprint for unit in units}) == len({unit.name for unit in units}) == 3
    rows = read(tmp_path / "a.parquet")
    assert [(row["source"], row["images"][0]) for row in rows] == [
        (f"a.parquet:{n + 1}", f"{n}.jpg") for n in range(12)
    ]


def test_invalid_utf8_rejects_only_its_row(tmp_path: Path) -> None:
    captions = pa.array([b"one", b"\xff", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": ["a", "b", "c"], "caption": captions}), tmp_path / "a.parquet")
    assert [row["reason"] for row in read(tmp_path / "a.parquet")] == [None, "record_malformed", None]


def test_a_damaged_row_group_is_one_rejected_row_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, [{"image": f"{n:0400}"} for n in range(30)], row_group_size=10, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    rows = read(path)
    assert [row["reason"] for row in rows] == [None] * 10 + ["source_damaged"] + [None] * 10
    assert rows[10]["source"] == "a.parquet:11"
    assert "10 of its 10 rows" in rows[10]["detail"]


@pytest.mark.parametrize("cut", [0, 100, -4])
def test_a_truncated_parquet_file_is_one_rejected_row(tmp_path: Path, cut: int) -> None:
    parquet(tmp_path / "a.parquet", [{"image": "a"}] * 10)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:cut])
    assert reasons(read(tmp_path / "a.parquet")) == {"a.parquet": "source_damaged"}


def dataset_of(number: int) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": f"body {n}".encode(), "path": None} for n in range(number)],
        "text": [f"text {n}" for n in range(number)],
        "label": [n % 2 for n in range(number)],
    }
    types = {
        "image": datasets.Image(decode=False),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
    }
    return datasets.Dataset.from_dict(rows, datasets.Features(types))


def test_huggingface_datasets_saved_on_disk(tmp_path: Path) -> None:
    dataset_of(5).save_to_disk(tmp_path / "pets", num_shards=2)
    rows = read(tmp_path / "pets", language="en")
    assert [row["bodies"] for row in rows] == [[f"body {n}".encode()] for n in range(5)]
    assert [texts(row) for row in rows] == [[f"text {n}"] for n in range(5)]
    assert [row["metadata"] for row in rows] == [{"label": n % 2} for n in range(5)]
    assert rows[3]["source"] == "pets/data-00001-of-00002.arrow:1"
    assert {row["split"] for row in rows} == {None}


def test_a_dataset_dict_gives_splits(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": dataset_of(3), "Test.A": dataset_of(2)}).save_to_disk(tmp_path / "pets")
    rows = read(tmp_path / "pets")
    assert sorted((row["split"], row["source"]) for row in rows) == [
        ("test-a", "pets/Test.A/data-00000-of-00001.arrow:1"),
        ("test-a", "pets/Test.A/data-00000-of-00001.arrow:2"),
        *(("train", f"pets/train/data-00000-of-00001.arrow:{n}") for n in (1, 2, 3)),
    ]
    assert len({row["key"] for row in rows}) == 5


@pytest.mark.parametrize("left", [0.3, 0.8, -8])
def test_a_truncated_arrow_file_keeps_its_complete_rows(tmp_path: Path, left: float) -> None:
    dataset_of(3000).save_to_disk(tmp_path / "pets")
    file = tmp_path / "pets" / "data-00000-of-00001.arrow"
    data = file.read_bytes()
    file.write_bytes(data[: int(left * len(data)) if left > 0 else int(left)])
    rows = read(tmp_path / "pets")
    assert rows[-1]["reason"] == "source_damaged"
    assert all(row["reason"] is None for row in rows[:-1])
    if left == -8:
        assert len(rows) == 3001


def test_a_missing_arrow_file_is_a_rejected_row(tmp_path: Path) -> None:
    dataset_of(4).save_to_disk(tmp_path / "pets", num_shards=2)
    (tmp_path / "pets" / "data-00000-of-00002.arrow").unlink()
    assert [row["reason"] for row in read(tmp_path / "pets")] == ["source_damaged", None, None]


INPUTS = [
    {"key": "000000000", "status": "success", "error_message": None},
    {"key": "000000001", "status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"},
    {"key": "000000002", "status": "success", "error_message": None},
    {"key": "000000003", "status": "failed_to_resize", "error_message": "Image decoding error"},
]


def write_img2dataset(folder: Path, **more: Any) -> Path:
    rows = [{**row, "url": f"http://h/{n}", "caption": f"text {n}", **more} for n, row in enumerate(INPUTS)]
    parquet(folder / "00000.parquet", rows)
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_img2dataset_tars_account_for_every_input(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "out")
    with webdataset.TarWriter(str(folder / "00000.tar")) as writer:
        writer.write({"__key__": "000000000", "jpg": b"J", "txt": "text 0", "json": {"caption": "text 0", "url": "u"}})
    rows = read(folder)
    assert reasons(rows) == {
        "out/00000.tar:000000000": None,
        "out/00000.parquet:2": "fetch_failed",
        "out/00000.parquet:3": "image_missing",
        "out/00000.parquet:4": "image_unreadable",
    }
    assert (texts(rows[0]), rows[0]["bodies"]) == (["text 0"], [b"J"])
    assert rows[1]["detail"] == "http://h/1: HTTP Error 404: Not Found"


def test_img2dataset_folders_of_files(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "out")
    (folder / "00000").mkdir()
    (folder / "00000" / "000000002.jpg").write_bytes(b"J")
    (folder / "00000" / "000000002.txt").write_bytes(b"text 2")
    rows = read(folder)
    assert [row["reason"] for row in rows] == ["image_missing", "fetch_failed", None, "image_unreadable"]
    assert (rows[2]["images"], texts(rows[2]), rows[2]["key"]) == (["00000/000000002.jpg"], ["text 2"], "000000002")


def test_img2dataset_images_missing_from_the_table_are_read_with_their_sidecars(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "out")
    for shard, key in (("00000", 2), ("00000", 9), ("00001", 10), ("00001", 11), ("00002", 12)):
        (folder / shard).mkdir(exist_ok=True)
        (folder / shard / f"{key:09d}.jpg").write_bytes(b"J")
        (folder / shard / f"{key:09d}.txt").write_text(f"text {key}")
        (folder / shard / f"{key:09d}.json").write_text(json.dumps({"caption": f"text {key}", "url": "u", "key": "k"}))
    (folder / "00002" / "000000012.json").write_text("{")
    (folder / "00003.parquet").write_bytes(b"cut")
    (folder / "00003").mkdir()
    (folder / "00003" / "000000013.jpg").write_bytes(b"J")
    rows = read(folder)
    assert reasons(rows) == {
        "out/00000.parquet:1": "image_missing",
        "out/00000.parquet:2": "fetch_failed",
        "out/00000.parquet:3": None,
        "out/00000.parquet:4": "image_unreadable",
        "out/00000/000000009.jpg": None,
        "out/00001/000000010.jpg": None,
        "out/00001/000000011.jpg": None,
        "out/00002/000000012.jpg": "record_malformed",
        "out/00003.parquet": "source_damaged",
        "out/00003/000000013.jpg": None,
    }
    unlisted = next(row for row in rows if row["source"] == "out/00000/000000009.jpg")
    assert (unlisted["key"], unlisted["images"], texts(unlisted)) == ("000000009", ["00000/000000009.jpg"], ["text 9"])
    assert unlisted["metadata"] == {"url": "u"}


def test_a_changed_img2dataset_sidecar_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "out" / "00000").mkdir(parents=True)
    (tmp_path / "out" / "00000" / "1.jpg").write_bytes(b"J")
    source = SourceConfig(uri=str(tmp_path / "out"), kind="img2dataset")
    prints = set()
    for text in ("fox", "cow"):
        (tmp_path / "out" / "00000" / "1.txt").write_text(text)
        prints.add(list_units([source])[0].fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ([b"J", b"J"], True),
        ([{"bytes": b"J", "path": "http://h/x.jpg"}] * 2, True),
        ([{"bytes": None, "path": "http://h/x.jpg"}, {"bytes": b"J", "path": "b"}], False),
        ([b"J", None], False),
        (["http://h/x.jpg"] * 2, False),
    ],
)
def test_a_table_of_bodies_has_no_urls(tmp_path: Path, image: Any, expected: bool) -> None:
    parquet(tmp_path / "a.parquet", [{"image": value, "url": "http://h/y.jpg"} for value in image], row_group_size=1)
    (unit,) = list_units([SourceConfig(uri=str(tmp_path / "a.parquet"))])
    assert parquet_source.holds_bodies(unit, FieldsConfig()) == expected
    assert parquet_source.holds_bodies(unit, FieldsConfig(image="url")) is False


def test_img2dataset_tables_with_bodies(tmp_path: Path) -> None:
    rows = read(write_img2dataset(tmp_path / "out", jpg=b"J"))
    assert [row["reason"] for row in rows] == [None, "fetch_failed", None, "image_unreadable"]
    assert rows[0]["bodies"] == [b"J"]
    assert "jpg" not in rows[0]["metadata"]
    assert rows[0]["metadata"]["url"] == "http://h/0"


def test_an_invalid_utf8_error_message_rejects_only_its_img2dataset_row(tmp_path: Path) -> None:
    folder = write_img2dataset(tmp_path / "out")
    table = pq.read_table(folder / "00000.parquet")
    messages = pa.array([b"x", b"\xff", b"x", b"gone"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(2, "error_message", messages), folder / "00000.parquet")
    rows = read(folder, kind="img2dataset")
    expected = ["image_missing", "record_malformed", "image_missing", "image_unreadable"]
    assert [row["reason"] for row in rows] == expected


def test_a_folder_without_a_saved_dataset_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="save_to_disk"):
        read(tmp_path, kind="huggingface")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(MisuseError, match="not JSON"):
        read(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": []}))
    with pytest.raises(MisuseError, match="nothing to read"):
        read(tmp_path)
