"""Samples by shard and row: what was written, or an error that says where it no longer is."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmflow.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.loading.reader import Caption, Reader
from mmflow.shards.dataset import Dataset, open_dataset, read_sample
from mmflow.shards.index import MEMBERS, read_index_and_commit, write_index


@pytest.fixture
def copy(small_dataset: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(small_dataset.uri, tmp_path / "copy")
    return open_dataset(str(tmp_path / "copy"))


def test_every_sample_comes_back_as_it_was_recorded(small_dataset: Dataset) -> None:
    reader = Reader(small_dataset, "train")
    samples = list(reader)
    assert len(samples) == len(reader) == 31
    assert [shard.samples for shard in reader.shards] == [9, 14, 8]  # the shard without samples is passed over
    for number, sample in enumerate(samples):
        english, chinese = Caption(f"picture {number}", "en"), Caption(f"图片 {number}", "zh")
        assert sample.key == f"key-{number}"
        assert sample.captions == ((english, chinese) if number % 2 else (english,))
        assert sample.metadata == {"classes": {"group": f"group {number % 3}"}, "number": number}
        assert sample.extension == "jpg"


def test_reader_agrees_with_the_dataset_s_own_random_access(small_dataset: Dataset) -> None:
    reader = Reader(small_dataset, "train")
    for ordinal, row in ((2, 7), (0, 0), (1, 13), (0, 8)):
        plain = read_sample(small_dataset, reader.shards[ordinal], row)
        sample = reader.read(ordinal, row)
        assert (sample.key, sample.image, sample.extension) == (plain["key"], plain["image"], plain["image_extension"])
        assert sample.captions[0].text == plain["txt"]


def test_splits_are_apart(small_dataset: Dataset) -> None:
    assert [sample.key for sample in Reader(small_dataset, "dev")] == [f"key-{number}" for number in range(31, 36)]
    with pytest.raises(MisuseError, match="no split 'test'; there are dev, train"):
        Reader(small_dataset, "test")


@pytest.mark.parametrize("member", MEMBERS)
def test_a_corrupted_byte_is_refused_naming_shard_row_and_key(copy: Dataset, member: str) -> None:
    shard = copy.shards("train")[1]
    entry = copy.index(shard).slice(3, 1).to_pylist()[0]
    tar = Path(copy.tar_uri(shard))
    data = bytearray(tar.read_bytes())
    data[entry[f"{member}_offset"] + entry[f"{member}_bytes"] - 1] ^= 1
    tar.write_bytes(data)
    reader = Reader(copy, "train")
    with pytest.raises(CorruptArtifactError) as caught:
        reader.read(1, 3)
    said = str(caught.value)
    assert said.startswith(f"{tar}: {member} of row 3 ({entry['key']}) is not what was written")
    assert f"mmflow verify {copy.uri}" in said
    assert reader.read(1, 2).key == "key-11"  # its neighbours are sound
    assert reader.read(1, 4).key == "key-13"


def test_a_tar_cut_short_is_refused(copy: Dataset) -> None:
    tar = Path(copy.tar_uri(copy.shards("train")[0]))
    tar.write_bytes(tar.read_bytes()[: copy.index(copy.shards("train")[0])["txt_offset"][8].as_py()])
    reader = Reader(copy, "train")
    assert reader.read(0, 7).key == "key-7"
    with pytest.raises(CorruptArtifactError, match=r"txt of row 8 \(key-8\)"):
        reader.read(0, 8)


def test_an_index_of_another_length_is_refused(copy: Dataset) -> None:
    path = Path(copy.uri, "index", "00000.parquet")
    table, commit = read_index_and_commit(str(path))
    write_index(str(path), table.slice(0, 8), commit)
    with pytest.raises(CorruptArtifactError, match="its index has 8 rows, the manifest says 9"):
        Reader(copy, "train").read(0, 0)


def test_a_tar_or_index_that_is_gone_is_named(copy: Dataset) -> None:
    Path(copy.uri, "shards", "00000.tar").unlink()
    Path(copy.uri, "index", "00001.parquet").unlink()
    reader = Reader(copy, "train")
    with pytest.raises(MissingArtifactError, match=r"00000\.tar: no such file"):
        reader.read(0, 0)
    with pytest.raises(MissingArtifactError, match=r"00001\.parquet"):
        reader.read(1, 0)


def test_reader_is_safe_between_threads(small_dataset: Dataset) -> None:
    reader = Reader(small_dataset, "train")
    wanted = [(ordinal, row) for row in range(8) for ordinal in range(3)] * 10
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda place: reader.read(*place).key, wanted))
    starts = (0, 9, 23)
    assert found == [f"key-{starts[ordinal] + row}" for ordinal, row in wanted]
