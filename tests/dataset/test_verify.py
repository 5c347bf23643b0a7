"""Verify: no errors for an intact dataset; for a damaged one it names the shard and the damage."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmflow.dataset import verify as module
from mmflow.dataset.opened import Dataset
from mmflow.dataset.tar import check_members, layout_of, pass_over
from mmflow.dataset.verify import Repeat, repeated_keys, verify_dataset
from tests.dataset.handmade import Handmade, edit_index, flip_bit, handmade, write_dataset

REJECTED = [
    {"source": f"records.jsonl:{number}", "key": f"bad-{number}", "reason": reason, "detail": "unusable"}
    for number, reason in enumerate(("image_missing", "image_missing", "caption_missing"))
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 samples in four shards, one of them empty, and three rejected records. Read only."""
    samples = [handmade(number) for number in range(60)]
    shards = [("train", samples[:25]), ("train", samples[25:45]), ("train", []), ("dev", samples[45:])]
    return write_dataset(tmp_path_factory.mktemp("verify") / "dataset", shards, REJECTED)


def tar_of(dataset: Dataset, number: int = 0) -> Path:
    return Path(dataset.tar_uri(dataset.shards("train")[number]))


def index_of(dataset: Dataset, number: int = 0) -> Path:
    return Path(dataset.uri, "index", f"{dataset.shards('train')[number].name}.parquet")


def test_an_intact_dataset_has_no_errors(dataset: Dataset) -> None:
    assert verify_dataset(dataset.uri) == []
    assert verify_dataset(dataset.uri, decoded_samples=None) == []
    assert verify_dataset(dataset.uri, decoded_samples=0) == []


def test_a_flipped_byte_in_a_header_body_or_padding_is_reported(copy: Dataset) -> None:
    tar = tar_of(copy)
    sound = tar.read_bytes()
    offset = copy.index(copy.shards("train")[0])["image_offset"][3].as_py()
    for position, message in ((offset - 500, "damaged header"), (offset + 9, "checksum"), (len(sound) - 1, "checksum")):
        flip_bit(tar, position)
        errors = verify_dataset(copy.uri, decoded_samples=None)
        assert errors
        assert all(tar.name in line for line in errors)
        assert any(message in line or "bytes" in line for line in errors), errors
        tar.write_bytes(sound)


def test_a_truncated_tar_is_reported(copy: Dataset) -> None:
    tar = tar_of(copy, 1)
    sound = tar.read_bytes()
    offset = copy.index(copy.shards("train")[1])["txt_offset"][2].as_py()
    for end, message in ((offset - 512, "without an end of archive"), (offset + 1, "within"), (0, "0 bytes")):
        tar.write_bytes(sound[:end])
        errors = verify_dataset(copy.uri)
        assert any(tar.name in line and message in line for line in errors), errors


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda copy: tar_of(copy).unlink(), "no such file"),
        (lambda copy: index_of(copy).unlink(), "no such file"),
        (lambda copy: index_of(copy).write_bytes(b"PAR1"), "not a shard's index"),
        (lambda copy: shutil.copy(tar_of(copy), tar_of(copy).with_name("09999.tar")), "not in the manifest"),
        (lambda copy: shutil.rmtree(Path(copy.uri, "quarantine")), "totals.quarantined"),
        (lambda copy: Path(copy.uri, "manifest.json").unlink(), "nothing was committed"),
        (lambda copy: Path(copy.uri, "manifest.json").write_text("{}"), "not of format"),
        (lambda copy: edit_manifest(copy, lambda fields: fields.pop("totals")), "not a dataset's manifest"),
        (lambda copy: edit_manifest(copy, lambda fields: fields.update(fingerprint="0")), "fingerprint"),
        (lambda copy: edit_manifest(copy, lambda fields: fields["shards"].pop()), "totals.samples"),
        (lambda copy: edit_manifest(copy, lambda fields: fields["totals"]["reasons"].popitem()), "totals.reasons"),
        (lambda copy: edit_index(copy, lambda rows: rows[3].update(key=None)), "key with empty cells"),
        (lambda copy: edit_index(copy, lambda rows: rows[3].update(row=7)), "not counted from 0"),
        (lambda copy: edit_index(copy, lambda rows: rows[3].update(width=7)), "the index has 7×"),
        (lambda copy: edit_index(copy, lambda rows: rows[6]["frames"].pop()), "key-6.002.jpg"),
        (lambda copy: edit_index(copy, lambda rows: rows[6]["frames"][1].update(xxh3=1)), "frame 2 is not"),
        (lambda copy: edit_index(copy, lambda rows: rows.pop()), "is not in the index"),
    ],
)
def test_missing_and_wrong_files_are_reported(copy: Dataset, damage: Callable[[Dataset], object], message: str) -> None:
    damage(copy)
    errors = verify_dataset(copy.uri)
    assert any(message in line for line in errors), errors
    assert all(copy.uri in line and "\n" not in line for line in errors)


def edit_manifest(dataset: Dataset, change: Callable[[dict[str, object]], object]) -> None:
    path = Path(dataset.uri, "manifest.json")
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_prepared_pieces_of_a_build_are_not_reported(copy: Dataset) -> None:
    Path(copy.uri, "prepared").mkdir()
    Path(copy.uri, "prepared", "00000.pack").write_bytes(b"images")
    Path(copy.uri, "shards", ".staging-x").write_bytes(b"a killed writer's")
    assert verify_dataset(copy.uri) == []


def test_swapped_shards_and_repeated_keys_are_reported(copy: Dataset) -> None:
    first, second = copy.shards("train")[:2]
    shutil.copy(copy.tar_uri(first), copy.tar_uri(second))
    shutil.copy(index_of(copy, 0), index_of(copy, 1))
    edit_manifest(copy, lambda fields: fields["shards"][1].update(samples=25))  # type: ignore[index]
    errors = verify_dataset(copy.uri)
    assert any("belongs to another tar" in line for line in errors)
    assert any(f"{second.name}.tar" in line and "of its shards" not in line for line in errors)
    assert any(f"{second.name}.tar: and " in line for line in errors)


def test_a_repeated_key_is_reported_with_both_places(tmp_path: Path) -> None:
    samples = [handmade(number) for number in range(6)]
    twice = write_dataset(tmp_path / "twice", [("train", samples[:4]), ("dev", [*samples[4:], samples[2]])])
    (line,) = verify_dataset(twice.uri)
    # Splits in the order of their names: dev comes first.
    assert line.endswith("00000.tar: row 2: key 'key-2' is also in shard 00001, row 2")


@pytest.mark.parametrize("key", ["Upper", "a.b", "../x", "a/b", "ä", "x" * 81, "key\n", ""])
def test_keys_that_tars_cannot_hold_are_reported(key: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "keys", [("train", [handmade(1), Handmade(key=key, captions=[CAPTION])])])
    assert any(f"00000.tar: row 1: key {key!r} is not lower-case" in line for line in verify_dataset(dataset.uri))


CAPTION = {"language": "en", "text": "a picture"}


def test_an_index_with_wrong_offsets_or_hashes_is_reported(copy: Dataset) -> None:
    edit_index(copy, lambda rows: rows[2].update(txt_offset=rows[2]["txt_offset"] + 1))
    edit_index(copy, lambda rows: rows[3].update(json_xxh3=rows[3]["json_xxh3"] ^ 1))
    errors = verify_dataset(copy.uri, decoded_samples=None)
    assert any("00000.tar: row 2: no member key-2.txt of" in line for line in errors)
    assert any("00000.tar: row 3" in line and "json is not what was written" in line for line in errors)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_fast_pass_accepts_no_damaged_tar(dataset: Dataset, tmp_path: Path, data: st.DataObject) -> None:
    """Also for a truncated tar and for a tar with trailing bytes."""
    shard = dataset.shards("train")[0]
    layout = layout_of(dataset.index(shard), ours=True)
    tar = bytearray(Path(dataset.tar_uri(shard)).read_bytes())
    kind = data.draw(st.sampled_from(("flip", "cut", "more")))
    if kind == "flip":
        offset = data.draw(st.sampled_from([*layout.offsets.tolist(), len(tar) + 512 - 1024]))
        tar[offset - 512 + data.draw(st.integers(0, 511))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del tar[data.draw(st.integers(0, len(tar) - 1)) :]
    else:
        tar += bytes(data.draw(st.integers(1, 2000)))
    path = tmp_path / "damaged.tar"
    path.write_bytes(tar)
    assert not pass_over(str(path), layout).sound
    path.write_bytes(Path(dataset.tar_uri(shard)).read_bytes())
    assert pass_over(str(path), layout).sound
    assert list(check_members(str(path), layout)) == []


def test_damage_of_remote_tars_is_reported(copy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmflow.dataset.tar.local_path", lambda uri: None)  # takes the code path of object stores
    assert verify_dataset(copy.uri, decoded_samples=0) == []
    offset = copy.index(copy.shards("train")[0])["image_offset"][3].as_py()
    flip_bit(tar_of(copy), offset - 500)
    errors = verify_dataset(copy.uri, decoded_samples=0)
    assert any(f"00000.tar: byte {offset - 512}: damaged header" in line for line in errors)


def test_decoded_samples_are_spread_over_the_shards(copy: Dataset) -> None:
    """Decoding one sample of every shard would decode 100,000 pictures for 100,000 shards."""
    for shard in copy.shards("train"):
        edit_index(copy, lambda rows: [row.update(image_xxh3=0) for row in rows], shard.name)
    errors = verify_dataset(copy.uri, decoded_samples=3)
    assert sum("image is not what was written" in line for line in errors) in (2, 3)


def test_many_errors_of_one_shard_do_not_hide_those_of_others(copy: Dataset) -> None:
    first, second = copy.shards("train")[:2]
    edit_index(copy, lambda rows: rows.reverse())
    tar_of(copy, 1).write_bytes(b"")
    errors = verify_dataset(copy.uri)
    assert sum(f"{first.name}.tar" in line for line in errors) <= 11
    assert any(f"{second.name}.tar" in line for line in errors)


def test_verifying_is_much_faster_than_reading_with_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU time without decoding. tests/benchmarks measures a factor of 8 to 10."""
    body = bytes(range(256)) * 117  # 30 KB
    monkeypatch.setattr("tests.dataset.handmade.picture", lambda seed, size: body)
    samples = [Handmade(key=f"{number:08d}", captions=[CAPTION]) for number in range(1500)]
    large = write_dataset(tmp_path / "large", [("train", samples[:750]), ("train", samples[750:])])
    tars = [large.tar_uri(shard) for shard in large.shards("train")]

    def verify() -> None:
        assert verify_dataset(large.uri, decoded_samples=0) == []

    def iterate() -> None:
        assert sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False)) == 1500

    assert seconds(verify) < seconds(iterate) / 3


def seconds(work: Callable[[], object]) -> float:
    """The fastest of five runs."""
    times = []
    for _ in range(5):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


SHARDS = st.lists(st.lists(st.sampled_from([f"key-{number}" for number in range(30)]), max_size=12), max_size=6)


def repeats_by_dict(shards: list[list[str]]) -> set[Repeat]:
    first: dict[str, tuple[int, int]] = {}
    repeats = set()
    for shard, keys in enumerate(shards):
        for row, key in enumerate(keys):
            if key in first:
                repeats.add(Repeat(shard, row, key, *first[key]))
            first.setdefault(key, (shard, row))
    return repeats


@given(SHARDS, st.integers(1, 100))
def test_repeated_keys_match_a_dict(shards: list[list[str]], per_pass: int) -> None:
    columns = [pa.array(keys, pa.string()) for keys in shards]
    repeats = list(repeated_keys(columns.__getitem__, [len(keys) for keys in shards], per_pass=per_pass))
    assert len(repeats) == len(set(repeats))
    assert set(repeats) == repeats_by_dict(shards)


def test_two_keys_with_the_same_hash_are_not_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash_texts", lambda texts: np.zeros(len(texts), np.uint64))
    shards = [pa.array(["a", "b"]), pa.array(["c", "a"])]
    assert list(repeated_keys(shards.__getitem__, [2, 2])) == [Repeat(1, 1, "a", 0, 0)]


def test_each_pass_holds_a_bounded_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    original = module.repeated_values

    def measure(parts: object) -> object:
        parts = list(parts)  # type: ignore[call-overload]
        held.append(sum(len(part) for part in parts))
        return original(parts)

    monkeypatch.setattr(module, "repeated_values", measure)
    shards = [pa.array([f"key-{shard}-{row}" for row in range(500)]) for shard in range(8)]
    assert list(repeated_keys(shards.__getitem__, [500] * 8, per_pass=1000)) == []
    assert len(held) == 4
    assert sum(held) == 4000
    assert max(held) < 1150
