"""Folders of images: sidecars, captions files, clips, and the stray files of real folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmflow.core.errors import MisuseError
from mmflow.sources import folder as folder_source
from mmflow.sources.config import SourceConfig
from mmflow.sources.records import KEY
from mmflow.sources.sources import list_units
from tests.sources.reading import read, reasons, texts


def write(folder: Path, **files: str | bytes) -> None:
    """Files by name, with `__` for a dot and `___` for a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_sidecars_of_the_same_stem(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write(
        photos,
        a__jpg=b"",
        a__txt="a fox",
        b__PNG=b"",
        b__json=json.dumps({"captions": [{"language": "de", "text": "ein Fuchs"}], "split": "test", "size": 3}),
        c__webp=b"",
        c__json='{"caption": "both"}',
        c__txt="both",
        d___e__jpg=b"",
        d___e__jpg__txt="by its whole name",
        f__gif=b"",
        g__jpg=b"",
        g__json='{"key": "my-id-7"}',
        notes__pdf=b"",
    )
    rows = {row["source"]: row for row in read(photos, language="en")}
    assert sorted(rows) == [
        "photos/a.jpg",
        "photos/b.PNG",
        "photos/c.webp",
        "photos/d/e.jpg",
        "photos/f.gif",
        "photos/g.jpg",
    ]
    assert rows["photos/a.jpg"]["captions"] == [{"language": "en", "text": "a fox"}]
    assert rows["photos/b.PNG"]["captions"] == [{"language": "de", "text": "ein Fuchs"}]
    assert (rows["photos/b.PNG"]["split"], rows["photos/b.PNG"]["metadata"]) == ("test", {"size": 3})
    assert texts(rows["photos/c.webp"]) == ["both"]
    assert texts(rows["photos/d/e.jpg"]) == ["by its whole name"]
    assert rows["photos/d/e.jpg"]["images"] == ["d/e.jpg"]
    assert rows["photos/f.gif"]["captions"] == []
    assert rows["photos/g.jpg"]["key"] == "my-id-7"
    assert {row["root"] for row in rows.values()} == {str(photos)}
    assert {row["reason"] for row in rows.values()} == {None}
    assert all(KEY.fullmatch(row["key"]) for row in rows.values())


def test_keys_and_fingerprints_are_the_same_elsewhere(tmp_path: Path) -> None:
    for place in ("x", "y/z"):
        write(tmp_path / place / "photos", a__jpg=b"1", a__txt="x", b___c__jpg=b"2")
    first, second = (SourceConfig(uri=str(tmp_path / place / "photos")) for place in ("x", "y/z"))
    names = [[(unit.name, unit.fingerprint) for unit in list_units([source])] for source in (first, second)]
    assert names[0] == names[1]
    assert [row["key"] for row in read(first.uri)] == [row["key"] for row in read(second.uri)]


def test_a_changed_caption_of_the_same_length_changes_the_fingerprint(tmp_path: Path) -> None:
    source = SourceConfig(uri=str(tmp_path))
    write(tmp_path, a__jpg=b"", a__txt="fox")
    before = list_units([source])[0].fingerprint
    write(tmp_path, a__txt="cow")
    assert list_units([source])[0].fingerprint != before


def test_a_bad_sidecar_rejects_only_its_own_record(tmp_path: Path) -> None:
    write(tmp_path, a__jpg=b"", a__txt=b"\xff\xfe", b__jpg=b"", b__json="{", c__jpg=b"", c__txt="fine", d__txt="alone")
    name = tmp_path.name
    assert reasons(read(tmp_path)) == {
        f"{name}/a.jpg": "record_malformed",
        f"{name}/b.jpg": "record_malformed",
        f"{name}/c.jpg": None,
        f"{name}/d.txt": "image_missing",
    }


@pytest.mark.parametrize(
    ("name", "captions"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "text": "one"}\n{"file_name": "./sub/b.jpg", "text": "two"}\n{\n'
            '{"file_name": "gone.jpg", "text": "three"}\n{"file_name": "http://h/x.jpg", "text": "four"}',
        ),
        ("captions.csv", "file_name,text\na.jpg,one\nsub/b.jpg,two\nx,y,z\ngone.jpg,three\nhttp://h/x.jpg,four\n"),
    ],
)
def test_a_captions_file_lists_records_and_other_images_are_read_too(tmp_path: Path, name: str, captions: str) -> None:
    write(tmp_path / "p", a__jpg=b"", sub___b__jpg=b"", c__jpg=b"", c__txt="beside", **{name: captions})
    rows = read(tmp_path / "p")
    assert [(row["images"], texts(row)) for row in rows if row["reason"] is None] == [
        (["a.jpg"], ["one"]),
        (["sub/b.jpg"], ["two"]),
        (["gone.jpg"], ["three"]),
        (["http://h/x.jpg"], ["four"]),
        (["c.jpg"], ["beside"]),
    ]
    assert [row["reason"] for row in rows].count("record_malformed") == 1
    assert rows[-1]["source"] == "p/c.jpg"


def test_an_unreadable_captions_file_does_not_reject_the_images_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder, a__jpg=b"", a__txt="a fox", b__jpg=b"", sub___c__jpg=b"")
    (folder / "captions.jsonl").symlink_to(folder / "nowhere")
    rows = read(folder)
    assert reasons(rows) == {
        "p/captions.jsonl": "source_damaged",
        "p/a.jpg": None,
        "p/b.jpg": None,
        "p/sub/c.jpg": None,
    }
    assert texts(rows[1]) == ["a fox"]


def test_sidecars_that_differ_only_in_case_give_one_record_and_one_rejection(tmp_path: Path) -> None:
    write(tmp_path / "p", a__jpg=b"", a__txt="read", a__TXT="lost", b__jpg=b"", b__txt="same", b__TXT="same")
    rows = read(tmp_path / "p")
    assert reasons(rows) == {"p/a.jpg": None, "p/b.jpg": None, "p/a.TXT": "record_malformed"}
    assert [texts(row) for row in rows[:2]] == [["read"], ["same"]]
    assert "a.txt" in rows[2]["detail"]


def test_a_captions_file_in_a_subfolder_applies_to_that_subfolder(tmp_path: Path) -> None:
    write(
        tmp_path / "p",
        a__jpg=b"",
        captions__jsonl='{"image": "a.jpg", "caption": "one"}',
        sub___b__jpg=b"",
        sub___captions__jsonl='{"image": "b.jpg", "caption": "two"}',
    )
    rows = read(tmp_path / "p")
    assert sorted((row["source"], *row["images"], *texts(row)) for row in rows) == [
        ("p/captions.jsonl:1", "a.jpg", "one"),
        ("p/sub/captions.jsonl:1", "b.jpg", "two"),
    ]
    write(tmp_path / "p", metadata__csv="image,caption\n")
    with pytest.raises(MisuseError, match="both list captions"):
        read(tmp_path / "p")


def test_circular_links_end_without_repeated_records(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder, b___cat__jpg=b"")
    (folder / "b" / "up").symlink_to(folder)
    (folder / "a").symlink_to(folder / "b")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    write(tmp_path / "outside", dog__jpg=b"")
    (folder / "linked").symlink_to(tmp_path / "outside")
    assert reasons(read(folder)) == {
        "p/b/cat.jpg": None,
        "p/self.jpg": None,
        "p/gone.jpg": None,
        "p/linked/dog.jpg": None,
    }


def test_hidden_files_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "p", a__jpg=b"")
    (tmp_path / "p" / "._a.jpg").write_bytes(b"")
    (tmp_path / "p" / ".trash").mkdir()
    (tmp_path / "p" / ".trash" / "b.jpg").write_bytes(b"")
    assert list(reasons(read(tmp_path / "p"))) == ["p/a.jpg"]


def test_a_file_name_that_is_not_text_is_a_malformed_record(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "p")
    os.mkdir(folder)
    for name in (b"\xff.jpg", b"fine.jpg"):
        with open(folder + b"/" + name, "wb"):
            pass
    assert sorted(row["reason"] or "" for row in read(tmp_path / "p")) == ["", "record_malformed"]


def test_units_are_bounded_and_never_split_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_source, "FILES_PER_UNIT", 5)
    for number in range(7):
        write(tmp_path / "p", **{f"{number}__jpg": b"", f"{number}__txt": "x", f"sub___{number}__jpg": b""})
    units = list_units([SourceConfig(uri=str(tmp_path / "p"))])
    assert [len(unit.files) for unit in units] == [4, 4, 4, 2, 5, 2]
    assert [unit.records for unit in units] == [2, 2, 2, 1, 5, 2]
    assert len({unit.name for unit in units}) == 6
    assert [texts(row) for row in read(tmp_path / "p")] == [["x"]] * 7 + [[]] * 7


def test_an_added_folder_does_not_change_other_units(tmp_path: Path) -> None:
    write(tmp_path / "p", b___1__jpg=b"", d___1__jpg=b"")
    source = SourceConfig(uri=str(tmp_path / "p"))
    before = {(unit.name, unit.fingerprint) for unit in list_units([source])}
    write(tmp_path / "p", a___1__jpg=b"", c___1__jpg=b"")
    after = {(unit.name, unit.fingerprint) for unit in list_units([source])}
    assert before < after
    assert len(after) == 4


def test_each_folder_of_frames_is_one_record(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    for number in (1, 2, 10):
        write(clips, **{f"one___{number}__jpg": b"", f"deep___two___f{number}__png": b""})
    write(clips, one__txt="beside", deep___two___any__json='{"caption": "inside"}')
    rows = {row["source"]: row for row in read(clips, frames=True)}
    assert sorted(rows) == ["clips/deep/two", "clips/one"]
    assert rows["clips/one"]["images"] == ["one/1.jpg", "one/2.jpg", "one/10.jpg"]
    assert texts(rows["clips/one"]) == ["beside"]
    assert texts(rows["clips/deep/two"]) == ["inside"]
    write(clips, captions__jsonl='{"image": "one", "caption": "listed"}')
    rows = {row["source"]: row for row in read(clips, frames=True)}
    assert len(rows["clips/captions.jsonl:1"]["images"]) == 3
    assert texts(rows["clips/captions.jsonl:1"]) == ["listed"]
    assert texts(rows["clips/deep/two"]) == ["inside"]
