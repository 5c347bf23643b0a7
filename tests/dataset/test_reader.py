"""Samples by shard and row: what was written, or an error that says where the dataset is damaged."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mmflow.cleaning.captions import estimate_tokens
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.dataset import shard as reading
from mmflow.dataset.adopt import adopt
from mmflow.dataset.format import MEMBERS, read_index, write_index
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Caption, Reader
from tests.dataset.handmade import Handmade, edit_index, flip_bit, handmade, picture, wait_until, write_dataset
from tests.dataset.test_adopt import write as write_tar

STARTS = (0, 9, 23)  # the first number in each shard that has samples


@pytest.fixture(scope="module")
def dataset(small_dataset: Dataset) -> Dataset:
    return small_dataset


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twenty samples in two shards, every seventh a clip of three frames."""
    samples = [handmade(number) for number in range(20)]
    return write_dataset(
        tmp_path_factory.mktemp("clips") / "dataset", [("train", samples[:10]), ("train", samples[10:])]
    )


def test_every_sample_is_read_as_written(dataset: Dataset) -> None:
    reader = Reader(dataset, "train")
    samples = list(reader)
    assert len(samples) == len(reader) == 31
    assert [shard.samples for shard in reader.shards] == [9, 14, 8]  # the shard without samples is skipped
    for number, sample in enumerate(samples):
        english, chinese = Caption(f"picture {number}", "en"), Caption(f"图片 {number}", "zh")
        assert sample.key == f"key-{number}"
        assert sample.captions == ((english, chinese) if number % 2 else (english,))
        assert sample.metadata == {"classes": {"group": f"group {number % 3}"}, "number": number}
        assert sample.extension == "jpg"


def test_rows_are_read_in_any_order(dataset: Dataset) -> None:
    reader = Reader(dataset, "train")
    for ordinal, row in ((2, 7), (0, 0), (1, 13), (0, 8)):
        sample, members = reader.read(ordinal, row), reader.read_members(ordinal, row)
        with tarfile.open(dataset.tar_uri(reader.shards[ordinal])) as tar:
            stored = [tar.extractfile(f"{sample.key}.{suffix}").read() for suffix in ("jpg", "txt", "json")]  # type: ignore[union-attr]
        assert [members.image, members.txt, members.json] == stored
        assert sample.key == f"key-{STARTS[ordinal] + row}"
        assert (sample.image, sample.captions[0].text) == (stored[0], stored[1].decode())


@pytest.mark.parametrize("scan_bytes", [1, 4_000, 10_000, 1 << 30])
def test_scans_with_any_request_size_equal_single_reads(
    clips: Dataset, monkeypatch: pytest.MonkeyPatch, scan_bytes: int
) -> None:
    monkeypatch.setattr(reading, "SCAN_BYTES", scan_bytes)
    reader = Reader(clips, "train")
    remote = Reader(Dataset(f"fsspec+file://{clips.uri}", clips.manifest), "train")
    for first, stop in ((0, 10), (3, 4), (6, 9), (5, 5)):
        expected = [reader.read(1, row) for row in range(first, stop)]
        assert list(reader.samples(1, first, stop)) == list(remote.samples(1, first, stop)) == expected


def test_the_frames_of_a_clip_are_read_in_order(clips: Dataset) -> None:
    samples = list(Reader(clips, "train"))
    assert [len(sample.frames) for sample in samples] == [2 if number % 7 == 6 else 0 for number in range(20)]
    with tarfile.open(clips.tar_uri(clips.shards("train")[0])) as tar:
        stored = [tar.extractfile(f"key-6{frame}.jpg").read() for frame in ("", ".001", ".002")]  # type: ignore[union-attr]
    assert [samples[6].image, *samples[6].frames] == stored
    stills = list(Reader(clips, "train", frames=False))
    assert all(sample.frames == () for sample in stills)
    assert [sample.image for sample in stills] == [sample.image for sample in samples]


def test_lengths_come_from_the_index_without_the_tars(copy: Dataset) -> None:
    shutil.rmtree(Path(copy.uri, "shards"))
    reader = Reader(copy, "train")
    lengths = reader.lengths(1)
    # Samples with an odd number also have a Chinese caption; the estimate is that of the caption with most characters.
    assert lengths.tolist() == [estimate_tokens(f"picture {number}") for number in range(9, 23)]


def test_a_reader_reads_one_split(dataset: Dataset) -> None:
    assert [sample.key for sample in Reader(dataset, "dev")] == [f"key-{number}" for number in range(31, 36)]
    with pytest.raises(MisuseError, match="no split 'test'; there are dev, train"):
        Reader(dataset, "test")


@pytest.mark.parametrize("row", [-1, 9, 1 << 40])
def test_a_missing_row_is_misuse(dataset: Dataset, row: int) -> None:
    with pytest.raises(MisuseError, match=rf"00000\.tar: no row {row}; it has 9"):
        Reader(dataset, "train").read(0, row)


def test_adopted_tars_may_order_their_members_freely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg, png = picture(1, (64, 48)), picture(2, (30, 40), "PNG")
    members = [
        ("a.json", b'{"caption": "from json"}'),
        ("a.npy", b"x" * 5_000),  # unknown to the index, inside the sample
        ("a.png", png),
        ("readme.md", b"not a sample"),
        ("b.txt", "ünï".encode()),
        ("b.jpeg", jpeg),
        ("sub/ü.jpg", jpeg),
        ("sub/ü.txt", b"deep"),
        ("sub/ü.json", b"[1, 2]"),
    ]
    write_tar(tmp_path / "theirs.tar", members)
    adopt(str(tmp_path / "ours"), [str(tmp_path / "theirs.tar")])
    reader = Reader(open_dataset(str(tmp_path / "ours")), "train")
    samples = [(s.key, s.extension, s.image, s.captions[0].text, s.metadata) for s in reader]
    assert samples == [
        ("a", "png", png, "from json", {"caption": "from json"}),
        ("b", "jpg", jpeg, "ünï", {}),
        ("sub/ü", "jpg", jpeg, "deep", {"json": [1, 2]}),
    ]
    assert [reader.read(0, row).image for row in (2, 0, 1)] == [jpeg, png, jpeg]
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(reading.os, "pread", lambda file, size, offset: sizes.append(size) or pread(file, size, offset))
    reader.read(0, 0)
    reader.read(0, 1)
    assert sorted(sizes) == sorted([len(png), len(members[0][1]), len(jpeg), len("ünï".encode())])  # and nothing else


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_corrupted_byte_is_an_error_with_shard_row_and_key(copy: Dataset, member: str, place: str) -> None:
    entry = copy.index(copy.shards("train")[1]).slice(3, 1).to_pylist()[0]
    reader = Reader(copy, "train")
    tar = copy.tar_uri(reader.shards[1])
    flip_bit(tar, entry[f"{member}_offset"] + (0 if place == "first" else entry[f"{member}_bytes"] - 1))
    expected = re.escape(f"{tar}: {member} of row 3 ({entry['key']})") + ".*mmflow verify"
    for read in (lambda: reader.read(1, 3), lambda: list(reader.samples(1, 0, 14)), lambda: list(reader)):
        with pytest.raises(CorruptArtifactError, match=expected):
            read()
    assert reader.read(1, 2).key == "key-11"  # its neighbours are intact
    assert reader.read(1, 4).key == "key-13"


def test_a_corrupted_frame_is_an_error_with_its_number(clips: Dataset, tmp_path: Path) -> None:
    shutil.copytree(clips.uri, tmp_path / "copy")
    copy = open_dataset(str(tmp_path / "copy"))
    frames = copy.index(copy.shards("train")[0])["frames"][6].as_py()
    flip_bit(copy.tar_uri(copy.shards("train")[0]), frames[1]["offset"])
    with pytest.raises(CorruptArtifactError, match=r"00000\.tar: frame 2 of row 6 \(key-6\)"):
        Reader(copy, "train").read(0, 6)
    assert Reader(copy, "train", frames=False).read(0, 6).key == "key-6"  # it is not read


@pytest.mark.parametrize("change", [-1, +512])
def test_a_tar_of_another_size_is_refused_when_opened(copy: Dataset, change: int) -> None:
    shard = copy.shards("train")[0]
    tar = Path(copy.tar_uri(shard))
    tar.write_bytes((tar.read_bytes() + bytes(512))[: shard.bytes + change])
    reader = Reader(copy, "train")
    for read in (lambda: reader.read(0, 0), reader.check):
        with pytest.raises(CorruptArtifactError, match=f"{tar}: {shard.bytes + change} bytes.*{shard.bytes}"):
            read()
    assert reader.read(1, 0).key == "key-9"


def test_a_tar_truncated_while_open_is_an_error_with_the_row(copy: Dataset) -> None:
    reader = Reader(copy, "train")
    assert reader.read(0, 8).key == "key-8"
    tar = Path(copy.tar_uri(reader.shards[0]))
    with tar.open("r+b") as file:
        file.truncate(copy.index(reader.shards[0])["txt_offset"][8].as_py())
    assert reader.read(0, 7).key == "key-7"
    with pytest.raises(CorruptArtifactError, match=r"txt of row 8 \(key-8\)"):
        reader.read(0, 8)


def test_a_disk_error_names_the_tar_and_the_byte(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reading.os, "pread", fail)
    with pytest.raises(CorruptArtifactError, match=r"00000\.tar: byte 512 cannot be read \(Input/output error\)"):
        Reader(dataset, "train").read(0, 0)


def test_an_index_with_the_offsets_of_other_rows_is_refused(copy: Dataset) -> None:
    def reverse(rows: list[dict[str, Any]]) -> None:
        rows[:] = [{**row, "row": number} for number, row in enumerate(rows[::-1])]

    def reverse_offsets(rows: list[dict[str, Any]]) -> None:
        for row, offset in zip(rows, [row["image_offset"] for row in rows[::-1]], strict=True):
            row["image_offset"] = offset

    edit_index(copy, reverse)
    assert Reader(copy, "train").read(0, 4).key == "key-4"  # the same row from both ends
    edit_index(copy, reverse_offsets)
    with pytest.raises(CorruptArtifactError, match=r"00000\.tar: image of row 0 \(key-8\)"):
        Reader(copy, "train").read(0, 0)


def test_the_index_of_another_tar_is_refused(copy: Dataset) -> None:
    shutil.copy(f"{copy.uri}/index/00004.parquet", f"{copy.uri}/index/00000.parquet")
    with pytest.raises(CorruptArtifactError, match=r"00000\.parquet: 5 rows"):
        Reader(copy, "train").read(0, 0)
    table, _ = read_index(f"{copy.uri}/index/00001.parquet")
    _, commit = read_index(f"{copy.uri}/index/00003.parquet")
    write_index(f"{copy.uri}/index/00001.parquet", table, commit)
    with pytest.raises(CorruptArtifactError, match=r"00001\.parquet: belongs to a tar of"):
        Reader(copy, "train").read(1, 0)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("txt_offset", 1 << 40, "row 3 lies outside of its tar"),
        ("image_offset", -5, "row 3 lies outside of its tar"),
        ("json_bytes", 1 << 40, "row 3 lies outside of its tar"),
        ("row", 7, "rows are not counted from 0"),
        ("image_xxh3", None, "image_xxh3 with empty cells"),
    ],
)
def test_an_inconsistent_index_is_refused(copy: Dataset, column: str, value: int | None, message: str) -> None:
    edit_index(copy, lambda rows: rows[3].update({column: value}))
    with pytest.raises(CorruptArtifactError, match=rf"00000\.parquet: {message}.*mmflow verify"):
        Reader(copy, "train").read(0, 0)


def test_the_error_of_a_missing_tar_or_index_names_the_file(copy: Dataset) -> None:
    reader = Reader(copy, "train")
    reader.check()
    for name, ordinal in (("index/00001.parquet", 1), ("shards/00000.tar", 0)):
        Path(copy.uri, name).unlink()
        with pytest.raises(MissingArtifactError, match=name):
            reader.check()
        with pytest.raises(MissingArtifactError, match=name):
            reader.read(ordinal, 0)


def test_reader_is_safe_between_threads(dataset: Dataset) -> None:
    reader = Reader(dataset, "train")
    places = [(ordinal, row) for row in range(8) for ordinal in range(3)] * 10
    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(lambda place: reader.read(*place).key, places))
    assert keys == [f"key-{STARTS[ordinal] + row}" for ordinal, row in places]


def test_only_a_limited_number_of_shards_stays_open(clips: Dataset, tmp_path: Path) -> None:
    shards = [
        ("train", [Handmade(key=f"k{number}", captions=[{"language": "en", "text": "one"}])]) for number in range(5)
    ]
    reader = Reader(write_dataset(tmp_path / "many", shards), "train", open_shards=2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [reader.read(shard, 0).key for shard in (0, 4, 1, 3, 2, 0)] == ["k0", "k4", "k1", "k3", "k2", "k0"]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    del reader
    assert len(list(Path("/proc/self/fd").iterdir())) == before  # at once, without a garbage collection


def test_a_reader_can_be_pickled(clips: Dataset) -> None:
    reader = Reader(clips, "train", frames=False)
    reader.read(0, 0)
    again = pickle.loads(pickle.dumps(reader))  # noqa: S301 - our own
    assert [sample.key for sample in again] == [sample.key for sample in reader]
    assert again.read(0, 6).frames == ()


def test_a_remote_dataset_is_read_without_a_cache(remote: Dataset, dataset: Dataset) -> None:
    reader = Reader(remote, "train")
    reader.check()
    assert list(reader) == list(Reader(dataset, "train"))
    assert reader.read(2, 7) == Reader(dataset, "train").read(2, 7)
    store = fsspec.filesystem("memory")
    store.rm("/bucket/dataset/shards/00000.tar")
    store.pipe("/bucket/dataset/shards/00001.tar", b"short")
    with pytest.raises(MissingArtifactError, match=r"fsspec\+memory:.*00000\.tar: no such file"):
        Reader(remote, "train").read(0, 0)
    with pytest.raises(CorruptArtifactError, match=r"00001\.tar: 5 bytes, the manifest says"):
        Reader(remote, "train").read(1, 0)


def test_read_ahead_advises_the_kernel_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(reading.os, "posix_fadvise", lambda file, *rest: advised.append(rest))
    reader = Reader(dataset, "train")
    for _ in range(3):
        reader.read_ahead(1, 2, 5)
    reader.read_ahead(0, 0, 8)
    wait_until(lambda: len(advised) >= 2)
    index = dataset.index(reader.shards[1])
    start = index["image_offset"][2].as_py()
    stop = index["json_offset"][5].as_py() + index["json_bytes"][5].as_py()
    assert (start, stop - start, reading.os.POSIX_FADV_WILLNEED) in advised
    time.sleep(0.05)
    assert len(advised) == 2


def test_a_read_ahead_error_is_raised_once_by_the_next_read_of_that_shard(
    copy: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(copy, "train")
    failing = [True]

    def advise(*_: int) -> None:
        if failing[0]:
            raise ZeroDivisionError("a defect")

    monkeypatch.setattr(reading.os, "posix_fadvise", advise)
    reader.read_ahead(1, 0, 3)
    wait_until(lambda: bool(reader._ahead.failed))
    assert reader.read(0, 0).key == "key-0"
    with pytest.raises(ZeroDivisionError, match="a defect"):
        reader.read(1, 0)
    failing[0] = False
    assert reader.read(1, 0).key == "key-9"
    Path(copy.uri, "shards", "00003.tar").unlink()
    reader.read_ahead(2, 0, 3)
    wait_until(lambda: bool(reader._ahead.failed))
    with pytest.raises(MissingArtifactError, match=r"00003\.tar"):
        list(reader.samples(2, 0, 1))


def test_read_ahead_threads_end_with_their_reader(dataset: Dataset) -> None:
    def running() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "mmflow-read-ahead"}

    before = running()
    reader = Reader(dataset, "train")
    assert not running() - before  # none before they are needed
    reader.read_ahead(0, 0, 3)
    own = running() - before
    assert own
    del reader
    wait_until(lambda: not running() & own)
