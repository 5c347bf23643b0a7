"""Tars of other writers: all header formats, and damage that rejects only the samples it hits."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from mmflow.sources import webdataset as webdataset_source
from mmflow.sources.webdataset import Damage, Member, read_members, split_name
from tests.sources.reading import read, reasons, texts


def sample(number: int, **changes: Any) -> dict[str, Any]:
    return {"__key__": f"k{number}", "jpg": b"J" * 700, "txt": f"text {number}", "json": {"n": number}} | changes


def write(path: Path, samples: list[dict[str, Any]]) -> bytes:
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for item in samples:
            writer.write(item)
    return path.read_bytes()


def add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))


def header_offset(data: bytes, name: str) -> int:
    """The offset of a member's header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset


def test_tars_of_the_webdataset_library_are_read(tmp_path: Path) -> None:
    write(tmp_path / "00000.tar", [sample(0), sample(1, json={"caption": "text 1", "license": "CC0"})])
    first, second = read(tmp_path / "00000.tar", language="en")
    assert (first["source"], first["key"], first["bodies"]) == ("00000.tar:k0", "k0", [b"J" * 700])
    assert (first["captions"], first["metadata"]) == ([{"language": "en", "text": "text 0"}], {"n": 0})
    assert (texts(second), second["metadata"]) == (["text 1"], {"license": "CC0"})
    assert first["images"] is None


def test_our_own_tars_are_read(tmp_path: Path) -> None:
    captions = [{"language": "en", "text": "a fox"}, {"language": "zh", "text": "狐"}]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "k.jpg", b"first")
        add(tar, "k.txt", b"a fox")
        add(tar, "k.json", json.dumps({"captions": captions, "metadata": {"page": "p"}}).encode())
        add(tar, "k.002.jpg", b"third")
        add(tar, "k.001.jpg", b"second")
    (row,) = read(tmp_path / "a.tar")
    assert row["bodies"] == [b"first", b"second", b"third"]
    assert (row["captions"], row["metadata"]) == (captions, {"page": "p"})


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_header_formats_are_read(tmp_path: Path, format: int) -> None:
    folder = "d" * 60 if format == tarfile.USTAR_FORMAT else "d" * 160
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        info = tarfile.TarInfo("./x")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        for name in ("./x/a", f"{folder}/b", f"{folder}/ü"):
            add(tar, f"{name}.JPG", b"J")
            add(tar, f"{name}.txt", "grün".encode())
    rows = read(tmp_path / "a.tar")
    assert [row["metadata"].get("source_key") for row in rows] == ["x/a", f"{folder}/b", f"{folder}/ü"]
    assert [texts(row) for row in rows] == [["grün"]] * 3
    assert {row["reason"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v1.2/Cat.JPG", ("v1.2/Cat", "jpg")),
        ("./a.b.jpg", ("a", "b.jpg")),
        ("../x.jpg", ("../x", "jpg")),
        ("a.", ("a", "")),
        ("README", None),
        ("v1.2/README", None),
        ("d/._y.jpg", None),
    ],
)
def test_names_are_split_into_key_and_extension_like_in_webdataset(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected
    if "._" in name:
        return  # a hidden file in a folder is to webdataset a sample of the folder's name
    theirs = webdataset.tariterators.base_plus_ext(name.removeprefix("./"))
    assert (expected or (None, None)) == (theirs[0], theirs[1] and theirs[1].lower())


def test_each_repetition_of_a_key_is_a_record(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("k.jpg", "k.txt", "k.jpg", "k.txt", "j.jpg", "k.jpg"):
            add(tar, name, b"x")
    assert [row["key"] for row in read(tmp_path / "a.tar")] == ["k", "k", "j", "k"]


def test_an_incomplete_sample_rejects_no_other(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        bodies = {"c.txt": b"\xff", "d.json": b"[1]"}
        for name in ("a.txt", "b.jpg", "c.jpg", "c.txt", "d.png", "d.json", "e.jpg", "e.cls"):
            add(tar, name, bodies.get(name, b"x"))
    rows = read(tmp_path / "a.tar")
    assert reasons(rows) == {
        "a.tar:a": "image_missing",
        "a.tar:b": None,
        "a.tar:c": "record_malformed",
        "a.tar:d": "record_malformed",
        "a.tar:e": None,
    }
    assert "txt" in rows[0]["detail"]
    assert [rows[1]["captions"], rows[4]["captions"]] == [[], []]


def test_a_sample_with_an_overlarge_member_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_source, "MAX_MEMBER_BYTES", 1000)
    write(tmp_path / "a.tar", [sample(0), sample(1, jpg=b"J" * 1001), sample(2)])
    assert reasons(read(tmp_path / "a.tar")) == {"a.tar:k0": None, "a.tar:k1": "image_too_large", "a.tar:k2": None}


@pytest.mark.parametrize(
    ("member", "shift", "kept"),
    [
        ("k3.jpg", 0, [0, 1, 2]),  # between samples
        ("k3.txt", 0, [0, 1, 2]),  # between members
        ("k3.jpg", 900, [0, 1, 2]),  # inside a body
        ("k3.json", 200, [0, 1, 2]),  # inside a header
        ("k0.jpg", 0, []),
        ("k0.txt", 3, []),
    ],
)
def test_a_truncated_tar_keeps_its_complete_samples(tmp_path: Path, member: str, shift: int, kept: list[int]) -> None:
    path = tmp_path / "a.tar"
    data = write(path, [sample(number) for number in range(5)])
    cut = header_offset(data, member) + shift
    path.write_bytes(data[:cut])
    rows = read(path)
    assert [row["key"] for row in rows if row["reason"] is None] == [f"k{number}" for number in kept]
    (damage,) = [row for row in rows if row["reason"]]
    assert (damage["source"], damage["reason"]) == ("a.tar", "source_damaged")
    assert f"byte {cut}" in damage["detail"] or f"byte {cut - cut % 512}" in damage["detail"]
    if "k3" in member and member != "k3.jpg":
        assert "k3" in damage["detail"]


@pytest.mark.parametrize("member", ["k2.jpg", "k2.txt", "k2.json", "k0.jpg", "k1.jpg"])
def test_a_flipped_header_byte_rejects_one_sample(tmp_path: Path, member: str) -> None:
    path = tmp_path / "a.tar"
    lost = member.partition(".")[0]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(5):
            for extension in ("jpg", "json", "txt"):
                add(tar, f"k{number}.{extension}", b'{"n": 1}' if extension == "json" else b"x" * 600)
    data = bytearray(path.read_bytes())
    start = header_offset(bytes(data), member)
    data[start + 2] ^= 0x10
    path.write_bytes(data)
    rows = read(path)
    assert [row["key"] for row in rows if not row["reason"]] == [f"k{n}" for n in range(5) if f"k{n}" != lost]
    (damage,) = [row for row in rows if row["reason"]]
    assert damage["reason"] == "source_damaged"
    assert f"byte {start}:" in damage["detail"]
    assert lost in damage["detail"]


@pytest.mark.parametrize("data", [b"", b"not a tar", b"\x1f\x8b" + bytes(2000), bytes(range(256)) * 40])
def test_a_file_that_is_not_a_tar_is_one_rejected_row(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    (row,) = read(tmp_path / "a.tar")
    assert (row["source"], row["reason"]) == ("a.tar", "source_damaged")


def test_concatenated_tars_are_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"".join(write(tmp_path / "x", [sample(number)]) for number in (1, 2)))
    assert reasons(read(tmp_path / "a.tar")) == {"a.tar:k1": None, "a.tar:k2": None}


@given(st.integers(0, 6), st.data())
def test_every_cut_and_flip_is_reported(num_samples: int, data: st.DataObject) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(num_samples):
            add(tar, f"k{row}.jpg", b"x" * data.draw(st.integers(0, 1100)))
    archive = bytearray(stream.getvalue())
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512 if members else 0
    if data.draw(st.booleans()) or not members:
        cut = data.draw(st.integers(0, end))
        events = list(read_members(io.BytesIO(bytes(archive[:cut])), lambda name: True))
        whole = [member.name for member in members if member.offset_data + member.size <= cut]
        assert [event.name for event in events if isinstance(event, Member)][: len(whole)] == whole
        assert isinstance(events[-1], Damage)
        return
    hit = data.draw(st.sampled_from(members))
    archive[hit.offset + data.draw(st.integers(0, 511))] ^= data.draw(st.integers(1, 255))
    events = list(read_members(io.BytesIO(bytes(archive)), lambda name: True))
    damages = [event for event in events if isinstance(event, Damage)]
    lost = [hit] if damages else []  # the checksum's own padding may be anything
    assert [damage.offset for damage in damages] == [member.offset for member in lost]
    assert [event.name for event in events if isinstance(event, Member)] == [m.name for m in members if m not in lost]
