"""Verify: silent on a sound dataset, and naming the shard and the trouble on a damaged one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

from mmflow.shards.dataset import Dataset, open_dataset
from mmflow.shards.index import read_commit, read_index, write_index
from mmflow.shards.verify import verify_dataset


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(dataset.uri, tmp_path / "copy")
    return open_dataset(str(tmp_path / "copy"))


def tar_of(dataset: Dataset, number: int = 0) -> Path:
    return Path(dataset.tar_uri(dataset.shards("train")[number]))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def test_sound_dataset_has_nothing_wrong(dataset: Dataset) -> None:
    assert verify_dataset(dataset.uri) == []
    assert verify_dataset(dataset.uri, decoded_samples=None) == []
    assert verify_dataset(dataset.uri, decoded_samples=0) == []


def test_flipped_byte_in_a_header_a_body_or_the_padding(copy: Dataset) -> None:
    tar = tar_of(copy)
    sound = tar.read_bytes()
    offset = copy.index(copy.shards("train")[0])["image_offset"][3].as_py()
    for position, said in ((offset - 500, "damaged header"), (offset + 9, "checksum"), (len(sound) - 1, "checksum")):
        flip(tar, position)
        wrong = verify_dataset(copy.uri, decoded_samples=None)
        assert wrong
        assert all(tar.name in line for line in wrong)
        assert any(said in line or "bytes" in line for line in wrong), wrong
        tar.write_bytes(sound)


def test_tar_cut_at_a_member_and_within_one(copy: Dataset) -> None:
    tar = tar_of(copy, 1)
    sound = tar.read_bytes()
    offset = copy.index(copy.shards("train")[1])["txt_offset"][2].as_py()
    for end, said in ((offset - 512, "without an end of archive"), (offset + 1, "within"), (0, "0 bytes")):
        tar.write_bytes(sound[:end])
        wrong = verify_dataset(copy.uri)
        assert any(tar.name in line and said in line for line in wrong), wrong


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda copy: tar_of(copy).unlink(), "no such file"),
        (lambda copy: Path(copy.uri, "index", tar_of(copy).stem + ".parquet").unlink(), "no such file"),
        (
            lambda copy: Path(copy.uri, "index", tar_of(copy).stem + ".parquet").write_bytes(b"PAR1"),
            "not a shard's index",
        ),
        (lambda copy: shutil.copy(tar_of(copy), tar_of(copy).with_name("09999.tar")), "not in the manifest"),
        (lambda copy: shutil.rmtree(Path(copy.uri, "quarantine")), "totals.quarantined"),
        (lambda copy: Path(copy.uri, "manifest.json").unlink(), "nothing was committed"),
        (lambda copy: Path(copy.uri, "manifest.json").write_text("{}"), "not of format"),
        (lambda copy: edit_manifest(copy, lambda fields: fields.pop("totals")), "not a dataset's manifest"),
        (lambda copy: edit_manifest(copy, lambda fields: fields.update(fingerprint="0")), "fingerprint"),
        (lambda copy: edit_manifest(copy, lambda fields: fields["shards"].pop()), "totals.samples"),
    ],
)
def test_what_is_missing_or_amiss_is_named(copy: Dataset, damage: Callable[[Dataset], object], said: str) -> None:
    damage(copy)
    wrong = verify_dataset(copy.uri)
    assert any(said in line for line in wrong), wrong
    assert all(copy.uri in line and "\n" not in line for line in wrong)


def edit_manifest(dataset: Dataset, change: Callable[[dict[str, object]], object]) -> None:
    path = Path(dataset.uri, "manifest.json")
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_swapped_shards_repeated_keys_and_lying_indexes(copy: Dataset) -> None:
    first, second = copy.shards("train")[:2]
    shutil.copy(copy.tar_uri(first), copy.tar_uri(second))
    index = Path(copy.uri, "index")
    shutil.copy(index / f"{first.name}.parquet", index / f"{second.name}.parquet")
    wrong = verify_dataset(copy.uri)
    assert any(f"{second.name}.tar" in line and f"is also in shard {first.name}" in line for line in wrong)
    assert any("belongs to another tar" in line for line in wrong)


def test_index_that_points_elsewhere_is_found(copy: Dataset) -> None:
    shard = copy.shards("train")[0]
    path = str(Path(copy.uri, "index", f"{shard.name}.parquet"))
    table, commit = read_index(path), read_commit(path)
    rows = table.to_pylist()
    rows[2]["txt_offset"] += 1
    rows[3]["json_xxh3"] ^= 1
    write_index(path, table.from_pylist(rows, table.schema), commit)
    wrong = verify_dataset(copy.uri, decoded_samples=None)
    assert any(f"{shard.name}.tar: row 2: ('key-" in line for line in wrong)
    assert any(f"{shard.name}.tar: row 3" in line and "json is not what was written" in line for line in wrong)


def test_one_fault_does_not_drown_the_others(copy: Dataset) -> None:
    first, second = copy.shards("train")[:2]
    path = str(Path(copy.uri, "index", f"{first.name}.parquet"))
    table, commit = read_index(path), read_commit(path)
    write_index(path, table.take(list(reversed(range(table.num_rows)))), commit)
    tar_of(copy, 1).write_bytes(b"")
    wrong = verify_dataset(copy.uri)
    assert sum(f"{first.name}.tar" in line for line in wrong) <= 11
    assert any(f"{second.name}.tar" in line for line in wrong)


def test_quarantine_is_parquet_with_fixed_columns(dataset: Dataset) -> None:
    for path in Path(dataset.uri, "quarantine").iterdir():
        assert pq.read_schema(path).names == ["source", "key", "reason", "detail"]


def test_verifying_is_quicker_than_reading_with_webdataset(dataset: Dataset) -> None:
    """Without decoding on either side; the side-by-side figures are in tests/benchmarks."""
    tars = [dataset.tar_uri(shard) for split in dataset.splits for shard in dataset.shards(split)]

    def iterate() -> object:
        return sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False))

    assert seconds(lambda: verify_dataset(dataset.uri, decoded_samples=0)) < seconds(iterate)


def seconds(work: Callable[[], object]) -> float:
    """The quickest of five, which is the least disturbed."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
