"""The build: every record is counted, bytes do not depend on the workers, and a kill costs only time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmflow.cleaning.prepare import Preparation, prepare_piece, remove_pieces
from mmflow.cleaning.select import select_records
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import MisuseError, MmflowError
from mmflow.dataset.build import read_group
from mmflow.dataset.format import ShardInfo, fingerprint_of, shard_name
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.dataset.verify import verify_dataset
from mmflow.dataset.write import deal, extents_of_splits, plan_of, shards_of_splits, write_shards
from mmflow.loading.text import questions_of
from mmflow.report.dataset_page import write_description
from mmflow.sources.config import SourceConfig
from mmflow.sources.sources import list_units, read_unit
from tests.dataset.conftest import NUM_GOOD, SETTINGS, Build, Corpus, contents, write_corpus


def read(dataset: Dataset, shard: ShardInfo, row: int) -> Sample:
    reader = Reader(dataset, shard.split)
    return reader.read(reader.shards.index(shard), row)


def test_every_bad_record_is_quarantined_with_its_reason(dataset: Dataset, corpus: Corpus) -> None:
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


def test_every_good_record_becomes_a_sample_of_its_split(dataset: Dataset, corpus: Corpus) -> None:
    captions_of_key = {}
    for split in dataset.splits:
        for shard in dataset.shards(split):
            keys = dataset.index(shard)["key"].to_pylist()
            for row, key in enumerate(keys):
                sample = read(dataset, shard, row)
                number = int(str(sample.metadata["number"]))
                assert sample.key == key == f"key-{number}"
                assert split == ("train", "train", "train", "dev", "test")[number % 5]
                assert sample.image[:2] == b"\xff\xd8"
                captions_of_key[key] = [
                    {"language": caption.language, "text": caption.text} for caption in sample.captions
                ]
    assert captions_of_key == corpus.captions_of_key
    entry = dataset.index(dataset.shards("train")[0]).to_pylist()[1]
    assert (entry["row"], entry["width"], entry["height"], entry["image_extension"]) == (1, 64, 48, "jpg")
    assert entry["caption_tokens"] in range(2, 6)
    assert dataset.manifest["totals"]["splits"] == {"dev": 24, "test": 24, "train": 72}
    assert [dataset.samples(split) for split in dataset.splits] == [24, 24, 72]


def test_bytes_do_not_depend_on_the_pieces(dataset: Dataset, corpus: Corpus, tmp_path: Path, ray_cluster: None) -> None:
    sources = [SourceConfig(uri=corpus.uri, keys="strict")]
    records = pa.concat_tables(read_unit(list_units(sources)[0], sources[0])).sort_by("source")
    preparation = Preparation(
        dataset=str(tmp_path),
        image=SETTINGS.image,
        captions=SETTINGS.captions,
        splits={},
        group_by=None,
        fetched=None,
    )
    cuts = [0, 1, 40, 41, 100, records.num_rows]
    pieces = [prepare_piece(records.slice(start, stop - start), preparation)["piece"] for start, stop in pairwise(cuts)]
    selection = select_records(pieces, duplicates=SETTINGS.duplicates, max_images=None)
    rows = read_group(pieces, selection.rejected)
    shards = shards_of_splits(extents_of_splits(rows), SETTINGS.samples_per_shard, SETTINGS.bytes_per_shard)
    numbers = range(max(shard_range.stop for shard_range in shards.values()))
    write_shards(
        str(tmp_path),
        list(numbers),
        canonical_json(preparation.settings),
        selection.common_captions,
        *deal(rows, shards, SETTINGS.seed, 1),
    )
    remove_pieces(str(tmp_path))
    built = contents(dataset.uri)
    assert contents(tmp_path) == {name: built[name] for name in built if "/" in name}


def test_the_same_corpus_elsewhere_gives_the_same_bytes(
    dataset: Dataset, build: Build, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = write_corpus(tmp_path_factory.mktemp("another") / "place")
    assert contents(build(tmp_path, moved.uri).uri) == contents(dataset.uri)


KILLED = """
import sys
import ray
from tests.dataset.conftest import build_and_commit

ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
build_and_commit(*sys.argv[1:], progress=lambda done, total, note: print(note, done, total, flush=True))
"""


@pytest.mark.parametrize("moment", ["records 1", "shards 2 "])
def test_a_rerun_after_a_killed_driver_gives_the_same_bytes(
    moment: str, dataset: Dataset, build: Build, corpus: Corpus, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), corpus.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith(moment):
                os.kill(driver.pid, signal.SIGKILL)
                break
    assert driver.returncode == -signal.SIGKILL
    assert not (tmp_path / "manifest.json").exists()
    left = set((tmp_path / "index").glob("*.parquet")) | set((tmp_path / "prepared").glob("*.parquet"))
    assert left
    (tmp_path / "prepared" / ".staging-x").write_bytes(b"of a killed write")
    before = {path: path.stat().st_mtime_ns for path in left}
    written: dict[Path, int] = {}

    def watch(done: int, total: int, note: str) -> None:
        written.update({path: path.stat().st_mtime_ns for path in left})

    assert contents(build(tmp_path, corpus.uri, progress=watch).uri) == contents(dataset.uri)
    assert written == before, "finished files were written again"


def is_build_worker(process: psutil.Process) -> bool:
    """Whether the process is a worker of this session's Ray that runs a task of the build (not one of Ray's agents)."""
    with contextlib.suppress(psutil.Error):
        tasks = ("MapBatches", "StreamingRepartition", "read_hashes", "deal_", "find_", "measure_group", "write_shards")
        title = " ".join(process.cmdline()).removeprefix("ray::")
        return title.startswith(tasks) and psutil.Process() in process.parents()
    return False


def kill_workers(stop: threading.Event, seed: int) -> list[int]:
    """Kill up to four workers at seeded random times until `stop` is set. Returns their pids."""
    random, killed = np.random.default_rng(seed), []
    while not stop.wait(random.uniform(0.0, 0.2)):
        workers = (
            [] if len(killed) == 4 else [process.pid for process in psutil.process_iter() if is_build_worker(process)]
        )
        if workers:
            killed.append(int(random.choice(workers)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(killed[-1], signal.SIGKILL)
    return killed


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_workers_change_no_byte(
    seed: int, dataset: Dataset, build: Build, corpus: Corpus, tmp_path: Path
) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_workers, stop, seed)
        try:
            built = build(tmp_path, corpus.uri)
        finally:
            stop.set()
    assert killer.result(), "no worker was killed"
    assert contents(built.uri) == contents(dataset.uri)


def test_a_shard_without_its_tar_or_index_is_written_again(
    dataset: Dataset, build: Build, corpus: Corpus, tmp_path: Path
) -> None:
    build(tmp_path, corpus.uri)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shards/00001.tar").write_bytes(b"short")
    (tmp_path / "index/00002.parquet").write_bytes(b"PAR1 torn PAR1")
    (tmp_path / "index/00003.parquet").unlink()
    (tmp_path / "shards/00777.tar").write_bytes(b"of an abandoned build")
    assert contents(build(tmp_path, corpus.uri).uri) == contents(dataset.uri)


# 120 pictures of 4 KB: the disk fills up while writing pieces (200k) or shards (900k).
@pytest.mark.parametrize("size", ["200k", "900k"])
def test_a_full_disk_is_an_error_and_a_rerun_with_space_completes(
    size: str, small_disk: Callable[[str], Path], dataset: Dataset, build: Build, corpus: Corpus
) -> None:
    directory = small_disk(size) / "dataset"
    with pytest.raises(MmflowError, match=r"No space left on device.*rerun"):
        build(directory, corpus.uri)
    assert not (directory / "manifest.json").exists()
    small_disk("64m")
    assert contents(build(directory, corpus.uri).uri) == contents(dataset.uri)


def test_changed_settings_or_rows_change_the_plan() -> None:
    row: dict[str, Any] = {"place": 1, "key": "a", "captions": [{"language": "en", "text": "one"}], "frames": []}
    row |= {"image_bytes": 10, "pixel_hash": 7, "pack": "here", "image_offset": 0, "shard": 0}
    assert plan_of([row], "s") == plan_of([{**row, "place": 2, "pack": "there", "image_offset": 99}], "s")
    changed = [{**row, "pixel_hash": 8}, {**row, "captions": []}, {**row, "frames": [{"offset": 0, "bytes": 1}]}]
    assert len({plan_of([row], "s"), plan_of([row], "t"), *(plan_of([other_row], "s") for other_row in changed)}) == 5


def test_splits_fingerprint_and_misuse(dataset: Dataset) -> None:
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    assert [shard.name for shard in shards] == [shard_name(number) for number in range(len(shards))]
    assert dataset.fingerprint == fingerprint_of(shards)
    assert dataset == open_dataset(dataset.uri)
    with pytest.raises(MisuseError, match="no split 'validation'; there are dev, test, train"):
        dataset.shards("validation")


def test_a_corpus_without_usable_records_is_an_error(build: Build, tmp_path: Path) -> None:
    def attempt(text: str) -> None:
        (tmp_path / "records.jsonl").write_text(text)
        build(tmp_path / "d", str(tmp_path / "records.jsonl"))

    with pytest.raises(MmflowError, match=r"none of 2 records .*'record_malformed': 2.*quarantine/"):
        attempt("not\njson\n")
    assert len(list((tmp_path / "d/quarantine").iterdir())) == 1
    with pytest.raises(MmflowError, match=r"none of 1 records .*'image_missing': 1"):
        attempt(json.dumps({"key": "a", "image": "a.png", "captions": [{"text": "a fox"}]}))
    with pytest.raises(MmflowError, match="the sources hold no record"):
        attempt("\n\n")


def test_splits_are_drawn_by_group_and_do_not_depend_on_the_seed(build: Build, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    records = []
    for number in range(200):
        pixels = np.kron(random.integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        captions = [{"text": f"drawing {number}"}]
        records.append({"key": f"k{number}", "image": f"{number}.png", "captions": captions, "page": number // 4})
    source = tmp_path / "records.jsonl"
    source.write_text("\n".join(map(json.dumps, records)))

    def held_out(seed: int) -> set[int]:
        settings = SETTINGS.model_copy(update={"splits": {"validation": 0.2}, "group_by": "page", "seed": seed})
        dataset = build(tmp_path / f"d{seed}", str(source), settings=settings)
        keys = {
            split: {key for shard in dataset.shards(split) for key in dataset.index(shard)["key"].to_pylist()}
            for split in dataset.splits
        }
        pages = {split: {int(key[1:]) // 4 for key in keys[split]} for split in keys}
        assert not pages["train"] & pages["validation"], "a page is in both splits"
        assert 4 <= len(pages["validation"]) <= 18  # of 50, a fifth expected
        return pages["validation"]

    assert held_out(1) == held_out(2)


def test_shards_are_also_bounded_by_bytes(build: Build, corpus: Corpus, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"samples_per_shard": 1000, "bytes_per_shard": 64 << 10})
    dataset = build(tmp_path, corpus.uri, settings=settings)
    shards = dataset.shards("train")
    assert len(shards) > 1
    assert np.mean([shard.bytes for shard in shards]) < 80 << 10
    assert dataset.samples("train") == 72


def test_common_captions_are_dropped_and_records_with_no_other_are_rejected(build: Build, tmp_path: Path) -> None:
    records = []
    for number in range(6):
        Image.effect_noise((32, 32), 20 + number).convert("RGB").save(tmp_path / f"{number}.png")
        captions = [{"text": "clip art"}, *([{"text": f"drawing {number}"}] if number else [])]
        records.append({"key": f"k{number}", "image": f"{number}.png", "captions": captions})
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    captions = SETTINGS.captions.model_copy(update={"max_images": 5})
    settings = SETTINGS.model_copy(update={"captions": captions})
    dataset = build(tmp_path / "d", str(tmp_path / "records.jsonl"), settings=settings)
    captions_of_sample = [[caption.text for caption in sample.captions] for sample in Reader(dataset, "train")]
    assert sorted(captions_of_sample) == [[f"drawing {number}"] for number in range(1, 6)]
    assert dataset.manifest["totals"]["reasons"] == {"caption_too_common": 1}


def test_optional_captions_keep_records_without_captions(build: Build, tmp_path: Path) -> None:
    questions = [{"question": "is it noise?", "answers": ["yes"]}]
    records: list[dict[str, Any]] = []
    for number in range(9):
        Image.effect_noise((32, 32), 20 + number).convert("RGB").save(tmp_path / f"{number}.png")
        captions: list[dict[str, str]] = [{"text": "clip art"}] if number >= 3 else []  # too common
        captions += [{"text": f"drawing {number}"}] if number >= 6 else [{"text": "x"}]  # too short
        records.append({"key": f"k{number}", "image": f"{number}.png", "captions": captions, "questions": questions})
    del records[0]["captions"]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    captions_settings = SETTINGS.captions.model_copy(update={"required": False, "max_images": 5})
    duplicates = SETTINGS.duplicates.model_copy(update={"radius": 0, "caption_similarity": 0.3})
    settings = SETTINGS.model_copy(update={"captions": captions_settings, "duplicates": duplicates})
    dataset = build(tmp_path / "d", str(tmp_path / "records.jsonl"), settings=settings)
    assert dataset.manifest["totals"]["reasons"] == {"duplicate_caption": 2}
    samples = {sample.key: sample for sample in Reader(dataset, "train")}
    assert {key: [caption.text for caption in sample.captions] for key, sample in samples.items()} == {
        **{f"k{number}": [] for number in range(6)},
        "k6": ["drawing 6"],
    }
    assert [question.text for question in questions_of("k0", samples["k0"].metadata)] == ["is it noise?"]
    rows = [row for shard in dataset.shards("train") for row in dataset.index(shard).to_pylist()]
    assert {row["caption_tokens"] for row in rows if row["key"] != "k6"} == {0}
    assert verify_dataset(dataset.uri) == []
    assert "k0" in Path(write_description(dataset.uri)).read_text()


def test_evaluation_samples_are_not_trained_on(build: Build, corpus: Corpus, tmp_path: Path) -> None:
    first = json.loads(Path(corpus.uri).read_bytes().splitlines()[0])
    examination = tmp_path / "examination.jsonl"
    image = str(Path(corpus.uri).parent / first["image"])
    examination.write_text(json.dumps({"key": "exam", "image": image, "captions": [{"text": "what is it"}]}))
    held = build(tmp_path / "held", str(examination))
    duplicates = SETTINGS.duplicates.model_copy(update={"against": [held.uri]})
    dataset = build(tmp_path / "d", corpus.uri, settings=SETTINGS.model_copy(update={"duplicates": duplicates}))
    assert dataset.manifest["totals"]["reasons"]["duplicate_of_evaluation"] == 1
    assert dataset.manifest["totals"]["samples"] == NUM_GOOD - 1
