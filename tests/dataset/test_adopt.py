"""Adopting foreign tars: they become a dataset unchanged, bad samples are quarantined, damaged tars are refused."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmflow.core.errors import CorruptArtifactError, MisuseError, MmflowError
from mmflow.dataset import adopt as adopt_module
from mmflow.dataset.adopt import adopt
from mmflow.dataset.format import quarantine_files
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Caption, Reader
from mmflow.dataset.verify import verify_dataset
from tests.dataset.handmade import flip_bit, picture

JPEG, PNG = picture(1, (64, 48)), picture(2, (30, 40), "PNG")
Members = Sequence[tuple[str, bytes]]


def write(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar as tarfile writes it, owners, times and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size, info.uname, info.mtime = len(body), "someone", 1_700_000_000.5
            tar.addfile(info, io.BytesIO(body))
    return path


def good(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for number in range(start, start + count):
        members += [
            (f"{number:06d}.jpg", JPEG),
            (f"{number:06d}.txt", f"picture {number}".encode()),
            (f"{number:06d}.json", json.dumps({"url": f"a/{number}"}).encode()),
        ]
    return members


def rejected(dataset: Dataset) -> dict[str, str]:
    """Key → reason of the quarantined samples."""
    rows = [row for uri in quarantine_files(dataset.uri) for row in pq.read_table(uri).to_pylist()]
    assert len(rows) == dataset.manifest["totals"]["quarantined"]
    return {row["key"]: row["reason"] for row in rows}


def adopted(uri: Path, *tars: Path, **options: object) -> Dataset:
    adopt(str(uri), [str(tar) for tar in tars], **options)  # type: ignore[arg-type]
    assert verify_dataset(str(uri), decoded_samples=None) == []
    return open_dataset(str(uri))


def test_foreign_tars_become_a_readable_dataset(tmp_path: Path) -> None:
    tars = [write(tmp_path / f"theirs/part-{number}.tar", good(5, 5 * number)) for number in range(2)]
    before = [tar.read_bytes() for tar in tars]
    dataset = adopted(tmp_path / "ours", *tars, split="held_out", license="CC-BY-4.0")
    assert [tar.read_bytes() for tar in tars] == before
    assert [Path(dataset.tar_uri(shard)).read_bytes() for shard in dataset.shards("held_out")] == before
    assert os.path.samefile(tars[0], dataset.tar_uri(dataset.shards("held_out")[0]))
    samples = list(Reader(dataset, "held_out"))
    assert [sample.key for sample in samples] == [f"{number:06d}" for number in range(10)]
    assert samples[3].captions == (Caption("picture 3", "und"),)
    assert samples[3].metadata == {"url": "a/3"}
    assert (samples[3].image, samples[3].extension) == (JPEG, "jpg")
    index = dataset.index(dataset.shards("held_out")[1]).to_pylist()
    assert {(row["width"], row["height"], row["license"]) for row in index} == {(64, 48, "CC-BY-4.0")}
    assert [row["caption_characters"] for row in index] == [9] * 5
    assert [source["name"] for source in dataset.manifest["sources"]] == ["part-0.tar", "part-1.tar"]
    assert dataset.manifest["adopted"] is True


def test_keys_match_webdataset(tmp_path: Path) -> None:
    stems = ("IMG_1.JPG", "sub/dir/a.png", "v1.2/x.jpg", "./y.jpg")
    names = [name for stem in stems for name in (stem, stem[:-3] + "txt")]
    long = "folder/" * 20 + "z" * 120
    bodies = [PNG if name.endswith("png") else JPEG if name.lower().endswith("jpg") else b"text" for name in names]
    members = [*zip(names, bodies, strict=True), (f"{long}.jpg", JPEG), (f"{long}.txt", b"text")]
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        tar = write(tmp_path / f"{number}.tar", members, format)
        dataset = adopted(tmp_path / f"dataset-{number}", tar)
        keys = [sample.key for sample in Reader(dataset, "train")]
        samples = webdataset.WebDataset(str(tar), shardshuffle=False)
        assert keys == [sample["__key__"].removeprefix("./") for sample in samples]
        assert keys == ["IMG_1", "sub/dir/a", "v1.2/x", "y", long]


def test_captions_are_read_from_all_usual_members(tmp_path: Path) -> None:
    texts_of_key = {
        "txt": [("txt", b" a  caption\n")],
        "caption": [("caption", b"a caption")],
        "json-caption": [("json", b'{"caption": "a caption"}')],
        "json-text": [("json", b'{"TEXT": "a caption", "license": "PD"}')],
        "json-list": [("json", b'{"captions": ["a caption", {"text": "zwei", "language": "de"}, 3]}')],
        "txt-and-json": [("txt", b"a caption"), ("json", b'{"caption": "another"}')],
        "broken-json": [("txt", b"a caption"), ("json", b"{")],
        "list-json": [("txt", b"a caption"), ("json", b"[1, 2]")],
        "none-but": [("json", b'{"captions":[],"metadata":{},"text":"a caption"}')],
        "ours": [("txt", b"x"), ("json", b'{"captions":[{"language":"en","text":"a caption"}],"metadata":{"a":1}}')],
    }
    members = []
    for key, texts in texts_of_key.items():
        members += [(f"{key}.jpg", JPEG), (f"{key}.cls", b"7"), *((f"{key}.{suffix}", body) for suffix, body in texts)]
        members += [(f"{key}.npy", b"\x93NUMPY"), (f"{key}.__key__", key.encode())]
    dataset = adopted(tmp_path / "dataset", write(tmp_path / "a.tar", members), license="CC0")
    samples = {sample.key: sample for sample in Reader(dataset, "train")}
    assert {key: sample.captions[0].text for key, sample in samples.items()} == dict.fromkeys(texts_of_key, "a caption")
    assert samples["json-list"].captions == (Caption("a caption", "und"), Caption("zwei", "de"))
    assert samples["ours"].captions == (Caption("a caption", "en"),)
    assert [samples[key].metadata for key in ("ours", "broken-json", "list-json")] == [{"a": 1}, {}, {"json": [1, 2]}]
    assert dataset.index(dataset.shards("train")[0])["license"].to_pylist().count("PD") == 1


def test_captions_may_be_optional(tmp_path: Path) -> None:
    questions = {"questions": [{"question": "what colour is it", "answers": ["red"]}]}
    members = [
        *good(1),
        ("classes.jpg", JPEG),
        ("classes.json", b'{"label": "shoe"}'),
        ("ours.jpg", JPEG),
        ("ours.txt", b""),
        ("ours.json", json.dumps({"captions": [], "metadata": questions}).encode()),
        ("alone.jpg", JPEG),
        ("no-image.txt", b"text"),
    ]
    tar = write(tmp_path / "a.tar", members)
    dataset = adopted(tmp_path / "dataset", tar, captions_required=False)
    assert {sample.key: (len(sample.captions), sample.metadata) for sample in Reader(dataset, "train")} == {
        "000000": (1, {"url": "a/0"}),
        "classes": (0, {"label": "shoe"}),
        "ours": (0, questions),
        "alone": (0, {}),
    }
    assert rejected(dataset) == {"no-image": "image_missing"}
    assert dataset.index(dataset.shards("train")[0])["caption_tokens"].to_pylist()[1:] == [0, 0, 0]
    with pytest.raises(MisuseError, match="other tars or settings"):
        adopt(dataset.uri, [str(tar)])


def test_bad_samples_are_quarantined_and_their_neighbours_kept(tmp_path: Path) -> None:
    bad = {
        "no-image": [("txt", b"text")],
        "no-caption": [("jpg", JPEG)],
        "blank": [("jpg", JPEG), ("txt", b" \n"), ("json", b'{"caption": 3}')],
        "not-text": [("jpg", JPEG), ("txt", b"\xff\xfe")],
        "not-image": [("jpg", b"<html>"), ("txt", b"text")],
        "empty-image": [("jpg", b""), ("txt", b"text")],
        "a": [("b.jpg", JPEG), ("b.txt", b"one"), ("c.jpg", JPEG), ("c.txt", b"two")],
        "../x": [("jpg", JPEG), ("txt", b"text")],
        "tab\there": [("jpg", JPEG), ("txt", b"text")],
    }
    members = good(2)
    for key, parts in bad.items():
        members += [(f"{key}.{suffix}", body) for suffix, body in parts]
    members += [*good(1, 2), *good(1, 0), ("README", b"not a sample")]
    dataset = adopted(tmp_path / "dataset", write(tmp_path / "a.tar", members), write(tmp_path / "b.tar", good(3, 1)))
    assert rejected(dataset) == {
        "no-image": "image_missing",
        "no-caption": "caption_missing",
        "blank": "caption_missing",
        "not-text": "record_malformed",
        "not-image": "image_not_an_image",
        "empty-image": "image_truncated",
        "a": "key_invalid",
        "../x": "key_invalid",
        "tab\there": "key_invalid",
        "000000": "key_repeated",
        "000001": "key_repeated",
        "000002": "key_repeated",
    }
    assert [sample.key for sample in Reader(dataset, "train")] == ["000000", "000001", "000002", "000003"]
    totals = dataset.manifest["totals"]
    assert (totals["records"], totals["samples"], totals["quarantined"]) == (16, 4, 12)


def test_a_truncated_or_damaged_tar_is_refused_with_the_byte_offset(tmp_path: Path) -> None:
    whole, tar = write(tmp_path / "a.tar", good(3)), tmp_path / "b.tar"
    intact = write(tar, good(3, 3), tarfile.USTAR_FORMAT).read_bytes()
    second = 512 + len(JPEG) + -len(JPEG) % 512
    flipped = bytearray(intact)
    flipped[second + 3] ^= 1
    for damaged, message in (
        (intact[:second], f"byte {second}: ends without an end of archive"),
        (intact[: second - 600], "ends within 000003.jpg"),
        (bytes(flipped), f"byte {second}: damaged header"),
        (b"", "byte 0: ends without an end of archive"),
        (b"no tar" * 1000, "byte 0: damaged header"),
    ):
        tar.write_bytes(damaged)
        uri = tmp_path / "dataset"
        with pytest.raises(CorruptArtifactError) as caught:
            adopt(str(uri), [str(whole), str(tar)])
        assert str(caught.value).startswith(f"{tar}: ")
        assert message in str(caught.value)
        assert "--skip-damaged" in str(caught.value)
        assert not (uri / "manifest.json").exists()
    dataset = adopted(tmp_path / "dataset", tar, whole, skip_damaged=True)
    assert dataset.manifest["totals"]["reasons"] == {"source_damaged": 1}
    assert [sample.key for sample in Reader(dataset, "train")] == ["000000", "000001", "000002"]
    assert [shard.name for shard in dataset.shards("train")] == ["00000"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 20_000))
def test_every_truncation_of_a_tar_is_an_error(tmp_path: Path, cut: int) -> None:
    tar = tmp_path / "a.tar"
    intact = write(tar, good(3), tarfile.USTAR_FORMAT).read_bytes().rstrip(b"\0")
    tar.write_bytes(intact[: min(cut, len(intact))])
    with pytest.raises(MmflowError):
        adopt(str(tmp_path / f"dataset-{cut}"), [str(tar)])


def test_a_rerun_returns_at_once_and_other_tars_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar, other = write(tmp_path / "a.tar", good(3)), write(tmp_path / "b.tar", good(4))
    uri = str(tmp_path / "dataset")
    assert adopt(uri, [str(tar)]).built
    monkeypatch.setattr("mmflow.dataset.adopt.index_tar", None)
    assert not adopt(uri, [str(tmp_path / "[a].tar")]).built
    for paths, options in (([tar, other], {}), ([tar], {"split": "dev"}), ([tar], {"license": "MIT"})):
        with pytest.raises(MisuseError, match="name a new directory"):
            adopt(uri, [str(path) for path in paths], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("killed_at", range(1, 12))
def test_a_resumed_adoption_gives_the_same_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    tars = [write(tmp_path / f"{number}.tar", [*good(3, 2 * number), ("x.txt", b"x")]) for number in range(3)]
    expected = adopted(tmp_path / "expected", *tars)
    calls = 0

    def interrupt(name: str) -> None:
        original = getattr(adopt_module, name)

        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(adopt_module, name, call)

    for name in ("bring", "write_parquet", "write_index", "commit"):
        interrupt(name)
    try:
        adopt(str(tmp_path / "dataset"), [str(tar) for tar in tars])
    except KeyboardInterrupt:
        assert not (tmp_path / "dataset/manifest.json").exists()
    monkeypatch.undo()
    dataset = adopted(tmp_path / "dataset", *tars)
    assert dataset.manifest == expected.manifest
    assert rejected(dataset) == rejected(expected)
    for folder in ("shards", "index", "quarantine"):
        files = [Path(uri, folder).iterdir() for uri in (dataset.uri, expected.uri)]
        resumed, unbroken = ({path.name: path.read_bytes() for path in paths} for paths in files)
        assert resumed == unbroken


def test_leftovers_of_an_abandoned_adoption_are_removed(tmp_path: Path) -> None:
    """Which keys repeat depends on the tars, so nothing of another list of tars may be reused."""
    first, second, third = (write(tmp_path / f"{number}.tar", good(3, 2 * number)) for number in range(3))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(first.read_bytes()[:2000])
    uri = str(tmp_path / "dataset")
    with pytest.raises(CorruptArtifactError):
        adopt(uri, [str(tar) for tar in (first, second, third, cut)])
    dataset = adopted(Path(uri), second, third)
    assert [sample.key for sample in Reader(dataset, "train")] == [f"{number:06d}" for number in range(2, 7)]
    assert sorted(path.name for path in Path(uri, "shards").iterdir()) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("reason", ["cross-device", "remote"])
def test_tars_that_cannot_be_linked_are_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    tar = write(tmp_path / "a.tar", good(3))

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def remote(uri: str) -> Path | None:
        return None if uri == str(tar) else Path(uri)

    if reason == "remote":
        monkeypatch.setattr("mmflow.dataset.grow.local_path", remote)
    else:
        monkeypatch.setattr(os, "link", refuse)
    dataset = adopted(tmp_path / "dataset", tar)
    (copy,) = Path(dataset.uri, "shards").iterdir()
    assert copy.read_bytes() == tar.read_bytes()
    assert not os.path.samefile(copy, tar)
    assert copy.stat().st_mode & 0o777 == 0o644


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    tar = write(tmp_path / "theirs/shards/00001.tar", good(3))
    write(tmp_path / "theirs/shards/00000.tar", good(3, 3))
    with pytest.raises(MisuseError, match=r"lies in .* itself"):
        adopt(str(tmp_path / "theirs"), [str(tar)])
    with pytest.raises(MisuseError, match=r"not empty \(shards\)"):
        adopt(str(tmp_path / "theirs"), [str(write(tmp_path / "b.tar", good(1)))])
    assert sorted(path.name for path in (tmp_path / "theirs/shards").iterdir()) == ["00000.tar", "00001.tar"]


def test_missing_tars_are_named(tmp_path: Path) -> None:
    for tars, message in (
        ([str(tmp_path / "nowhere.tar")], "nowhere.tar"),
        ([str(tmp_path)], "not a file"),
        ([], "no tars"),
    ):
        with pytest.raises(MisuseError, match=message):
            adopt(str(tmp_path / "dataset"), tars)
    with pytest.raises(MmflowError, match="no sample in 1 tars"):
        adopt(str(tmp_path / "none"), [str(write(tmp_path / "a.tar", [("a.txt", b"x")]))])


def test_damage_after_adoption_is_reported(tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", good(3))
    dataset = adopted(tmp_path / "dataset", tar)
    offset = dataset.index(dataset.shards("train")[0])["txt_offset"][1].as_py()
    flip_bit(tar, offset - 400)
    errors = verify_dataset(dataset.uri)
    assert any("00000.tar" in line and "the manifest has" in line for line in errors)
    assert any(f"byte {offset - 512}: damaged header" in line for line in errors), errors
