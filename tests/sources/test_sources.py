"""URIs of sources, the kinds and names of their units, and the Ray Dataset of all records."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from mmflow.core import listing
from mmflow.core.errors import MisuseError
from mmflow.core.listing import expand_braces
from mmflow.sources.config import SourceConfig, SourceKind
from mmflow.sources.records import RECORDS, ROWS_PER_CHUNK, rows_of_chunks
from mmflow.sources.sources import KINDS, list_units, read_chunks, source_names
from tests.sources.reading import read, read_all


def write(path: Path, *images: str) -> Path:
    """A JSONL file of records with these images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"image": image}) + "\n" for image in images))
    return path


def names(*uris: str | Path, **settings: Any) -> list[str]:
    return [unit.name for unit in list_units([SourceConfig(uri=str(uri), **settings) for uri in uris])]


@pytest.mark.parametrize(
    ("text", "alternatives"),
    [
        ("a", ["a"]),
        ("{a,b}/{1..3}", ["a/1", "a/2", "a/3", "b/1", "b/2", "b/3"]),
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,{b,c}}", ["a", "b", "c"]),
        ("{a}{}", ["{a}{}"]),
        ("x{,y}", ["x", "xy"]),
    ],
)
def test_braces_expand_to_lists_and_ranges(text: str, alternatives: list[str]) -> None:
    assert sorted(expand_braces(text)) == sorted(alternatives)


def test_a_backwards_range_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"\{127\.\.000\}"):
        expand_braces("s3://b/{127..000}.tar")


def test_globs_and_ranges_select_files(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"x{number}" / "part" / "r.jsonl", "a")
    write(tmp_path / "x1" / ".hidden.jsonl", "a")
    assert names(f"{tmp_path}/x*/part/r.jsonl") == [f"x{n}/part/r.jsonl" for n in range(3)]
    assert names(f"{tmp_path}/**/*.jsonl") == [f"x{n}/part/r.jsonl" for n in range(3)]
    assert names(f"{tmp_path}/x{{2,0}}/part/r.jsonl") == ["x2/part/r.jsonl", "x0/part/r.jsonl"]
    assert names(f"{tmp_path}/x[12]") == ["x1/part/r.jsonl", "x2/part/r.jsonl"]
    assert names(f"file://{tmp_path}/x0/part/r.jsonl") == ["r.jsonl"]


def test_an_existing_file_with_pattern_characters_in_its_name_is_read(tmp_path: Path) -> None:
    assert names(write(tmp_path / "photos [2020] {a,b}?.jsonl", "a")) == ["photos [2020] {a,b}?.jsonl"]


@pytest.mark.parametrize("pattern", ["no.jsonl", "no*.jsonl", "{r,gone}.jsonl", "r{0..1}.jsonl", "{2..1}.jsonl"])
def test_a_missing_source_is_misuse(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "r.jsonl", "a")
    with pytest.raises(MisuseError, match=r"no such file|backwards"):
        names(tmp_path / pattern)


def test_a_repeated_source_is_misuse(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", "a")
    for other in (path, tmp_path / "*.jsonl", tmp_path):
        with pytest.raises(MisuseError, match="named twice"):
            names(path, other)


def test_an_unknown_extension_is_misuse(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"image": "a"}')
    with pytest.raises(MisuseError, match="kind"):
        names(tmp_path / "r.json")
    assert names(tmp_path / "r.json", kind="jsonl") == ["r.json"]
    with pytest.raises(MisuseError, match="a folder is needed"):
        names(tmp_path / "r.json", kind="folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MisuseError, match="nothing to read"):
        names(tmp_path / "empty")


def test_unit_names_are_unique_and_do_not_change_when_sources_are_added(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a" / "r.jsonl", "a"), write(tmp_path / "b" / "r.jsonl", "a")
    assert names(a) == ["r.jsonl"]
    assert names(a, b) == ["r.jsonl", "b/r.jsonl"]
    assert names(a, f"{tmp_path}/b/*.jsonl") == ["r.jsonl", "b/r.jsonl"]
    rows = read_all([SourceConfig(uri=str(a)), SourceConfig(uri=str(b))])
    assert len({row["key"] for row in rows}) == 2
    assert [row["place"] >> 52 for row in rows] == [0, 1]


def test_source_names_differ_and_have_no_machine_paths() -> None:
    assert source_names(["/data/x/one.jsonl", "s3://bucket/two.jsonl"]) == ["one.jsonl", "two.jsonl"]
    assert source_names(["/data/x/a.jsonl", "/data/y/a.jsonl"]) == ["a.jsonl", "y/a.jsonl"]
    with pytest.raises(MisuseError, match="named twice"):
        source_names(["a.jsonl", "a.jsonl"])


def test_the_recipe_accepts_every_source_kind() -> None:
    assert set(get_args(SourceKind)) == {"auto", *KINDS}


def test_the_files_of_a_folder_decide_its_kind(tmp_path: Path) -> None:
    def kind_of(*files: str) -> str:
        folder = tmp_path / f"folder-{len(list(tmp_path.iterdir()))}"
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"")
        (kind,) = {unit.kind for unit in list_units([SourceConfig(uri=str(folder))])}
        return kind

    assert kind_of("a.jpg", "captions.jsonl", "page.html") == "folder"
    assert kind_of("0.tar", "readme.jpg") == "webdataset"
    assert kind_of("0.tar", "0.parquet", "0_stats.json") == "img2dataset"
    assert kind_of("a.parquet", "b/c.parquet") == "parquet"
    assert kind_of("a.jsonl") == "jsonl"
    assert kind_of("a.html") == "html"
    with pytest.raises(MisuseError, match="csv, jsonl"):
        kind_of("a.jsonl", "b.csv")


def test_fingerprints_depend_on_the_content_alone(tmp_path: Path) -> None:
    def prints(*uris: Path) -> list[str]:
        return [unit.fingerprint for unit in list_units([SourceConfig(uri=str(uri)) for uri in uris])]

    files = [write(tmp_path / f"{name}.jsonl", image) for name, image in (("a", "x"), ("b", "x"), ("c", "y"))]
    first, same, different = prints(*files)
    assert first == same != different
    files[0].touch()
    assert prints(files[0]) == [first]


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.FileSystem]:
    """An object store in memory, as s3://bucket/."""
    system = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    local = listing.filesystem

    def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
        return (system, "/" + uri.removeprefix("s3://").partition("?")[0]) if uri.startswith("s3://") else local(uri)

    monkeypatch.setattr(listing, "filesystem", filesystem)
    yield system
    system.delete_dir_contents("/", accept_root_dir=True)


def put(system: fs.FileSystem, path: str, data: bytes) -> None:
    system.create_dir(path.rpartition("/")[0], recursive=True)
    with system.open_output_stream(path) as stream:
        stream.write(data)


def test_object_stores_are_read(remote: fs.FileSystem, tmp_path: Path) -> None:
    put(remote, "/bucket/lists/a.jsonl", b'{"image": "x.jpg", "caption": "one"}\n')
    put(remote, "/bucket/lists/b.jsonl", b'{"image": "y.jpg", "caption": "two"}\n')
    rows = read("s3://bucket/lists/{a,b}.jsonl?region=x")
    assert [(row["source"], row["root"]) for row in rows] == [
        ("a.jsonl:1", "s3://bucket/lists?region=x"),
        ("b.jsonl:1", "s3://bucket/lists?region=x"),
    ]
    assert names("s3://bucket/l*/*.jsonl") == ["lists/a.jsonl", "lists/b.jsonl"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(__file__, "k.jpg")
    put(remote, "/bucket/tars/0.tar", (tmp_path / "0.tar").read_bytes())
    assert [row["source"] for row in read("s3://bucket/tars")] == ["tars/0.tar:k"]
    put(remote, "/bucket/photos/sub/a.jpg", b"")
    put(remote, "/bucket/photos/sub/a.txt", b"a fox")
    (row,) = read("s3://bucket/photos/")
    assert (row["source"], row["images"], row["root"]) == ("photos/sub/a.jpg", ["sub/a.jpg"], "s3://bucket/photos")
    assert row["captions"][0]["text"] == "a fox"
    with (tmp_path / "a.parquet").open("wb") as file:
        pq.write_table(pa.table({"url": ["http://h/x"]}), file)
    put(remote, "/bucket/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert [row["images"] for row in read("s3://bucket/a.parquet")] == [["http://h/x"]]


def test_a_rewritten_object_has_a_new_fingerprint(remote: fs.FileSystem) -> None:
    source = SourceConfig(uri="s3://bucket/a.jsonl")
    put(remote, "/bucket/a.jsonl", b'{"image": "x"}')
    before = list_units([source])[0].fingerprint
    assert list_units([source])[0].fingerprint == before
    put(remote, "/bucket/a.jsonl", b'{"image": "xy"}')
    assert list_units([source])[0].fingerprint != before


def test_each_block_of_the_ray_dataset_holds_one_chunk(ray_cluster: None, tmp_path: Path) -> None:
    write(tmp_path / "a" / "r.jsonl", *(f"{number}.jpg" for number in range(600)))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(__file__, "k.jpg")
    sources = [SourceConfig(uri=str(tmp_path / "a" / "r.jsonl")), SourceConfig(uri=str(tmp_path / "b.tar"))]
    dataset = read_chunks(list_units(sources), sources)
    dataset.context.enable_progress_bars = False
    chunks = [block for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow") if block.num_rows]
    assert [chunk.num_rows for chunk in chunks] == [1] * len(chunks)
    blocks = [rows_of_chunks(chunk) for chunk in chunks]
    assert all(block.schema.equals(RECORDS) for block in blocks)
    whole, rest = divmod(600, ROWS_PER_CHUNK)
    assert sorted(block.num_rows for block in blocks) == [1, rest, *[ROWS_PER_CHUNK] * whole]
    rows = sorted((row for block in blocks for row in block.to_pylist()), key=lambda row: row["place"])
    serial = read_all(sources)
    assert [{**row, "metadata": json.loads(row["metadata"])} for row in rows] == serial
