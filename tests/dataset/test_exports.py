"""Exports give other training loops the same samples as ours, and an error where tar readers would be silent."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.utils.data
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.dataset.cache import ShardCache
from mmflow.dataset.opened import RAY_SCHEMA, Dataset, cut
from mmflow.dataset.reader import Reader
from tests.dataset.handmade import flip_bit, handmade, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 samples of split `train` in four shards, every seventh a clip, and 5 of `dev`."""
    shards = [("train", [handmade(10 * shard + row) for row in range(10)]) for shard in range(4)]
    return write_dataset(
        tmp_path_factory.mktemp("exports") / "dataset",
        [*shards, ("dev", [handmade(number) for number in range(40, 45)])],
    )


def keys(samples: Any) -> list[str]:
    return [sample["__key__"] for sample in samples]


def test_the_pipeline_gives_the_samples_of_webdataset(dataset: Dataset) -> None:
    tars = [dataset.tar_uri(shard) for shard in dataset.shards("train")]
    theirs = list(webdataset.WebDataset(tars, shardshuffle=False))
    ours = list(dataset.as_webdataset("train"))
    assert ours == [{name: value for name, value in sample.items() if name != "__local_path__"} for sample in theirs]
    assert set(ours[6]) == {"__key__", "__url__", "jpg", "txt", "json", "001.jpg", "002.jpg"}


def test_the_pipeline_can_be_extended(dataset: Dataset) -> None:
    pipeline = dataset.as_webdataset("train").shuffle(20).decode("pil").to_tuple("jpg", "txt", "json")
    samples = sorted((fields["metadata"]["number"], image.size, text) for image, text, fields in pipeline)
    sizes = ((64, 48), (48, 64), (80, 40))
    assert samples == [(number, sizes[number % 3], f"picture {number}") for number in range(40)]


def test_ranks_and_workers_divide_the_shards(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    keys_of_rank = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        loader = torch.utils.data.DataLoader(dataset.as_webdataset("train"), batch_size=None, num_workers=2)
        keys_of_rank.append(keys(loader))
    assert list(map(len, keys_of_rank)) == [20, 20]
    assert sorted(keys_of_rank[0] + keys_of_rank[1]) == sorted(f"key-{number}" for number in range(40))


def test_a_seed_shuffles_the_shards_differently_each_epoch(dataset: Dataset) -> None:
    plain = keys(dataset.as_webdataset("train"))
    pipeline = dataset.as_webdataset("train", shuffle_shards=3)
    epochs = [keys(pipeline) for _ in range(4)]
    assert all(sorted(epoch) == sorted(plain) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = dataset.as_webdataset("train", shuffle_shards=3)
    assert [keys(again) for _ in range(4)] == epochs


def test_webdataset_reads_a_remote_dataset_through_the_cache(remote: Dataset, dataset: Dataset, tmp_path: Path) -> None:
    pipeline = remote.as_webdataset("train", cache=ShardCache(tmp_path / "cache", 1 << 30))
    assert keys(pipeline) == keys(dataset.as_webdataset("train"))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4


def test_damage_that_webdataset_misses_is_an_error(copy: Dataset) -> None:
    tar = copy.tar_uri(copy.shards("train")[1])
    offset = copy.index(copy.shards("train")[1])["image_offset"][5].as_py()
    flip_bit(tar, offset - 512)  # its header: tar readers stop here
    flip_bit(tar, offset)
    with warnings.catch_warnings(action="ignore"):
        assert len(list(webdataset.WebDataset(tar, shardshuffle=False))) == 5
    with pytest.raises(CorruptArtifactError, match=r"00001\.tar: image of row 5 \(key-15\)"):
        list(copy.as_webdataset("train"))


def test_changed_or_missing_shards_are_an_error_before_reading(copy: Dataset) -> None:
    tar = Path(copy.tar_uri(copy.shards("train")[2]))
    os.truncate(tar, tar.stat().st_size - 512)
    for export in (copy.as_webdataset, copy.to_ray_data):
        with pytest.raises(CorruptArtifactError, match=r"00002\.tar: .* the manifest says"):
            export("train")
    tar.unlink()
    for export in (copy.as_webdataset, copy.to_ray_data):
        with pytest.raises(MissingArtifactError, match=r"00002\.tar: no such file"):
            export("train")
        with pytest.raises(MisuseError, match="no split 'test'; there are dev, train"):
            export("test")


def test_ray_data_has_every_sample_once(dataset: Dataset, ray_cluster: None) -> None:
    data = dataset.to_ray_data("train")
    assert data.count() == 40
    assert data.schema().base_schema == RAY_SCHEMA
    samples = {sample.key: sample for sample in Reader(dataset, "train")}
    rows = data.take_all()
    assert sorted(row["key"] for row in rows) == sorted(samples)
    for row in rows:
        sample = samples[row["key"]]
        assert (row["image"], row["image_extension"]) == (sample.image, sample.extension)
        assert [(caption["text"], caption["language"]) for caption in row["captions"]] == [
            (caption.text, caption.language) for caption in sample.captions
        ]
        assert json.loads(row["metadata"]) == sample.metadata
        assert list(row["frames"]) == list(sample.frames)
    assert [row["key"] for row in dataset.to_ray_data("dev").take_all()] == [
        f"key-{number}" for number in range(40, 45)
    ]


def test_ray_data_raises_the_error_of_a_corrupt_sample(copy: Dataset, ray_cluster: None) -> None:
    shard = copy.shards("train")[3]
    flip_bit(copy.tar_uri(shard), copy.index(shard)["json_offset"][4].as_py())
    with pytest.raises(Exception, match=r"00003\.tar: json of row 4 \(key-34\)"):
        copy.to_ray_data("train").materialize()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 200))
def test_rows_are_cut_into_even_blocks(shard_samples: list[int], count: int) -> None:
    runs = cut(shard_samples, count)
    rows = [(shard, row) for run in runs for shard, first, stop in run for row in range(first, stop)]
    assert rows == [(shard, row) for shard, samples in enumerate(shard_samples) for row in range(samples)]
    sizes = [sum(stop - first for _, first, stop in run) for run in runs]
    assert len(runs) == min(count, sum(shard_samples))
    assert max(sizes) - min(sizes) <= 1
