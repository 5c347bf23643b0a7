"""The build: every record accounted for, the same bytes whoever builds, and a kill that costs only time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmflow.artifacts import commit
from mmflow.errors import CorruptArtifactError, MisuseError, MmflowError
from mmflow.ingest.config import SourceConfig
from mmflow.ingest.records import read_jsonl
from mmflow.shards.dataset import Dataset, fingerprint_of, index_uri, open_dataset, read_sample, shard_name
from mmflow.shards.exchange import assign, count_splits, shards_of_splits
from mmflow.shards.index import read_commit
from mmflow.shards.write import write_shards
from tests.shards.conftest import NUM_GOOD, SETTINGS, Build, Corpus, contents, write_corpus


def shards_of(dataset: Dataset) -> list[tuple[str, int]]:
    return [(shard.split, shard.samples) for split in dataset.splits for shard in dataset.shards(split)]


def test_every_bad_record_is_in_quarantine_with_its_reason(dataset: Dataset, corpus: Corpus) -> None:
    rows = [row for path in Path(dataset.uri, "quarantine").iterdir() for row in pq.read_table(path).to_pylist()]
    assert {row["source"]: row["reason"] for row in rows} == {
        f"records.jsonl:{line}": reason for line, reason in corpus.reason_of_line.items()
    }
    assert len(rows) == len(corpus.reason_of_line)
    assert not any(str(Path(corpus.uri).parent) in row["detail"] for row in rows)
    totals = dataset.manifest["totals"]
    assert totals["quarantined"] == len(rows)
    assert totals["records"] == len(rows) + NUM_GOOD
    assert sum(totals["reasons"].values()) == len(rows)


def test_every_good_record_is_a_sample_of_its_split(dataset: Dataset, corpus: Corpus) -> None:
    seen = {}
    for split in dataset.splits:
        for shard in dataset.shards(split):
            keys = dataset.index(shard)["key"].to_pylist()
            for row, key in enumerate(keys):
                sample = read_sample(dataset, shard, row)
                number = sample["json"]["metadata"]["number"]
                assert sample["key"] == key == f"key-{number}"
                assert split == ("train", "train", "train", "dev", "test")[number % 5]
                assert sample["txt"] == f"picture {number}"
                assert sample["image"][:2] == b"\xff\xd8"
                seen[key] = sample["json"]["captions"]
    assert seen == corpus.captions_of_key
    assert dataset.manifest["totals"]["splits"] == {"dev": 24, "test": 24, "train": 72}
    assert [dataset.samples(split) for split in dataset.splits] == [24, 24, 72]


def test_index_describes_the_stored_image(dataset: Dataset) -> None:
    shard = dataset.shards("train")[0]
    entry = dataset.index(shard).slice(1, 1).to_pylist()[0]
    assert (entry["row"], entry["width"], entry["height"], entry["image_extension"]) == (1, 64, 48, "jpg")
    assert entry["caption_tokens"] in range(2, 6)


def test_a_serial_build_without_ray_gives_the_same_bytes(dataset: Dataset, corpus: Corpus, tmp_path: Path) -> None:
    records = pa.concat_tables(read_jsonl(corpus.uri, "records.jsonl", 0))
    records = records.take(np.random.default_rng(1).permutation(records.num_rows))  # nor does their order matter
    counts = {split: number for split, number in count_splits(records).items() if split}
    shards = shards_of_splits(counts, SETTINGS["samples_per_shard"])
    assigned = assign(records, shards, SETTINGS["seed"])
    numbers = range(max(each.stop for each in shards.values()))
    names = [shard_name(number) for number in numbers]
    write_shards(str(tmp_path), names, list(numbers), SETTINGS["image"], SETTINGS["captions"], assigned)
    built = contents(dataset.uri)
    built.pop("manifest.json")
    assert contents(tmp_path) == built


def test_the_same_corpus_elsewhere_gives_the_same_bytes(
    dataset: Dataset, build: Build, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = write_corpus(tmp_path_factory.mktemp("another") / "place")
    assert contents(build(tmp_path, moved.uri).uri) == contents(dataset.uri)


KILLED = """
import sys
import ray
from mmflow.ingest.config import SourceConfig
from mmflow.shards.build import build_dataset
from tests.shards.conftest import SETTINGS

ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
build_dataset(
    sys.argv[1],
    sources=[SourceConfig(uri=sys.argv[2])],
    progress=lambda done, total: print("shard", done, total, flush=True),
    **SETTINGS,
)
"""


def test_killed_driver_then_rerun_gives_the_bytes_of_an_unbroken_build(
    dataset: Dataset, build: Build, corpus: Corpus, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), corpus.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("shard 2 "):
                os.kill(driver.pid, signal.SIGKILL)
                break
    assert driver.returncode == -signal.SIGKILL
    assert not (tmp_path / "manifest.json").exists()
    left = set((tmp_path / "index").glob("*.parquet"))
    assert 2 <= len(left) <= len(shards_of(dataset))
    (tmp_path / "shards" / ".staging-x").write_bytes(b"what a kill amid a write leaves")
    before = {path: path.stat().st_mtime_ns for path in left}
    assert contents(build(tmp_path, corpus.uri).uri) == contents(dataset.uri)
    assert {path: path.stat().st_mtime_ns for path in left} == before, "finished shards were written again"


def test_a_shard_that_lost_its_tar_or_index_is_written_again(
    dataset: Dataset, build: Build, corpus: Corpus, tmp_path: Path
) -> None:
    build(tmp_path, corpus.uri)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shards/00001.tar").write_bytes(b"short")
    (tmp_path / "index/00002.parquet").write_bytes(b"PAR1 torn PAR1")
    (tmp_path / "index/00003.parquet").unlink()
    (tmp_path / "shards/00777.tar").write_bytes(b"of an abandoned build")
    assert contents(build(tmp_path, corpus.uri).uri) == contents(dataset.uri)


def test_changed_settings_or_records_are_another_plan(dataset: Dataset, corpus: Corpus, tmp_path: Path) -> None:
    rows = pa.concat_tables(read_jsonl(corpus.uri, "records.jsonl", 0)).slice(0, 1)
    assigned = assign(rows, {"train": range(1)}, 0)
    image, captions = SETTINGS["image"], SETTINGS["captions"]

    def plan(table: pa.Table, image: object = image) -> str:
        write_shards(str(tmp_path), ["00000"], [0], image, captions, table)  # type: ignore[arg-type]
        return read_commit(index_uri(str(tmp_path), "00000")).plan

    first = plan(assigned)
    assert plan(assigned) == first
    assert plan(assigned, image.model_copy(update={"quality": 50})) != first
    position = assigned.schema.get_field_index("captions")
    other = pa.array([[{"language": "en", "text": "another"}]], assigned.schema.field("captions").type)
    assert plan(assigned.set_column(position, assigned.schema.field(position), other)) != first


def test_flipped_byte_is_refused_when_read(dataset: Dataset, tmp_path: Path) -> None:
    shard = dataset.shards("train")[0]
    entry = dataset.index(shard).slice(0, 1).to_pylist()[0]
    copy = Dataset(str(tmp_path), dataset.manifest)
    for name, data in contents(dataset.uri).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    tar = bytearray(Path(copy.tar_uri(shard)).read_bytes())
    tar[entry["txt_offset"]] ^= 1
    Path(copy.tar_uri(shard)).write_bytes(tar)
    with pytest.raises(CorruptArtifactError, match=f"{shard.name}.tar: txt of row 0"):
        read_sample(copy, shard, 0)
    assert read_sample(copy, shard, 1)["key"] == read_sample(dataset, shard, 1)["key"]


def test_splits_fingerprint_and_misuse(dataset: Dataset) -> None:
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    assert [shard.name for shard in shards] == [shard_name(number) for number in range(len(shards))]
    assert dataset.fingerprint == fingerprint_of(shards)
    assert dataset == open_dataset(dataset.uri)
    with pytest.raises(MisuseError, match="no split 'validation'; there are dev, test, train"):
        dataset.shards("validation")
    with pytest.raises(MisuseError, match="no row 9999"):
        read_sample(dataset, shards[0], 9999)


def test_nothing_usable_is_an_error_that_says_so(ray_cluster: None, tmp_path: Path) -> None:
    from mmflow.shards.build import build_dataset

    def attempt(text: str) -> None:
        (tmp_path / "records.jsonl").write_text(text)
        source = SourceConfig(uri=str(tmp_path / "records.jsonl"))
        build_dataset(str(tmp_path / "d"), sources=[source], progress=lambda done, total: None, **SETTINGS)

    with pytest.raises(MmflowError, match="none of 2 records can be read"):
        attempt("not\njson\n")
    with pytest.raises(MmflowError, match=r"none of 1 records gave a sample: {'image_missing': 1}"):
        attempt(json.dumps({"key": "a", "image": "a.png", "captions": [{"text": "a fox"}]}))
    with pytest.raises(MisuseError, match=r"elsewhere\.jsonl: no such file"):
        build_dataset(
            str(tmp_path / "d"),
            sources=[SourceConfig(uri=str(tmp_path / "elsewhere.jsonl"))],
            progress=lambda done, total: None,
            **SETTINGS,
        )


def test_a_split_without_a_good_record_is_an_empty_shard(ray_cluster: None, tmp_path: Path) -> None:
    from mmflow.shards.build import build_dataset
    from mmflow.shards.verify import verify_dataset

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    records = [
        {"key": "a", "image": "a.png", "captions": [{"text": "a fox"}]},
        {"key": "b", "image": "gone.png", "captions": [{"text": "a fox"}], "split": "dev"},
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    uri, source = str(tmp_path / "d"), SourceConfig(uri=str(tmp_path / "records.jsonl"))
    done: list[tuple[int, int]] = []
    commit(
        uri,
        "dataset",
        build_dataset(uri, sources=[source], progress=lambda *counts: done.append(counts), **SETTINGS),
    )
    assert shards_of(open_dataset(uri)) == [("dev", 0), ("train", 1)]
    assert done == [(1, 2), (2, 2)]
    assert verify_dataset(uri) == []
