"""Writing tars with index and checksum, and verifying them, compared with webdataset."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import data
from tests.benchmarks.measure import SHARE, call, rounds
from tests.benchmarks.table import Row, faster

SAMPLES_PER_SHARD = 2_500
MEMORY = Path("/dev/shm")
LEAST_SECONDS = 1.0
PEERS = ()
VERSIONS = ("webdataset", "pyarrow", "xxhash", "numpy")


def run() -> list[Row]:
    """Each pair over the same dataset."""
    dataset, count = sharded_jpegs()
    contestants = {name: f"tests.benchmarks.tars:{name}" for name in ("write_ours", "write_webdataset", "verify_ours")}
    found = rates(contestants | {"read_webdataset": "tests.benchmarks.reading:read_webdataset"}, dataset, count)
    in_memory = "on a memory file system, not to measure the disk"
    return [
        faster("write tar, index, hashes, checksum", found["write_ours"], "webdataset.TarWriter",
               found["write_webdataset"], goal=5, note=in_memory),
        faster("verify every byte and header", found["verify_ours"], "webdataset, iterating", found["read_webdataset"],
               goal=5, note="nothing decoded; one thread a shard"),
    ]  # fmt: skip


def sharded_jpegs() -> tuple[Path, int]:
    """The JPEGs as a dataset, which webdataset and Ray Data read too, and its samples."""
    count = round(SHARE * data.NUM_JPEGS)
    return data.dataset("tars", count, f"shard.samples_per_shard={SAMPLES_PER_SHARD}"), count


def rates(functions: Mapping[str, str], dataset: Path, count: int) -> dict[str, list[float]]:
    """Samples/s of each `module:function`, which returns the seconds of a pass; one value per round."""

    def rate(function: str) -> float:
        return count / call(function, uri=str(dataset))

    return rounds({name: partial(rate, function) for name, function in functions.items()})


# --- contestants, each called in a process of its own: seconds for the dataset at `uri` -------------------------------


def seconds_of(work: Callable[[], int], count: int) -> float:
    """The mean time of a pass, each of which must see `count` samples.

    The first is not counted: it imports what is imported late, half a second and more. The others fill a second at
    least, because one of ours takes a tenth of that.
    """
    assert work() == count
    began, passes = time.perf_counter(), 0
    while passes == 0 or time.perf_counter() - began < LEAST_SECONDS:
        assert work() == count
        passes += 1
    return (time.perf_counter() - began) / passes


def count_of(uri: str) -> int:
    from mmflow.dataset.opened import open_dataset

    dataset = open_dataset(uri)
    return sum(dataset.samples(split) for split in dataset.splits)


def write_ours(uri: str) -> float:
    """Images copied out of a pack into tars, with index, hashes and checksums; all of it published and synced."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from mmflow.cleaning.prepare import PIECE
    from mmflow.dataset.write import write_shards

    with _memory() as directory:
        samples = list(_samples(uri))
        pack = directory / "piece.pack"
        pack.write_bytes(b"".join(sample["image"] for sample in samples))
        offset, rows = 0, []
        for sample in samples:
            size = len(sample["image"])
            row = {name: sample[name] for name in PIECE.names if name in sample}
            rows.append({**row, "place": len(rows), "source": "records.jsonl", "split": "train", "frames": [],
                         "image_offset": offset, "image_bytes": size})  # fmt: skip
            offset += size
        table = pa.Table.from_pylist(rows, PIECE).append_column("pack", pa.array([str(pack)] * len(rows)))
        places = pc.cast(table["place"], pa.uint64())
        shards = pc.cast(pc.divide(table["place"], SAMPLES_PER_SHARD), pa.int64())
        table = table.append_column("shard", shards).append_column("hash", places)
        numbers = range(max(shards.to_pylist()) + 1)

        def work() -> int:
            # From nothing each time: existing shards would be kept.
            shutil.rmtree(directory / "out", ignore_errors=True)
            commits = write_shards(str(directory / "out"), numbers, "settings", np.array([], np.uint64), table)
            return sum(commit.samples for commit in commits)

        return seconds_of(work, len(samples))


def write_webdataset(uri: str) -> float:
    """The same bodies, from memory, into tars alone."""
    import webdataset

    with _memory() as directory:
        samples = [
            {"__key__": sample["key"], sample["image_extension"]: sample["image"], "txt": sample["txt"],
             "json": sample["json"]}
            for sample in _samples(uri)
        ]  # fmt: skip

        def work() -> int:
            for first in range(0, len(samples), SAMPLES_PER_SHARD):
                with webdataset.TarWriter(str(directory / f"{first}.tar")) as writer:
                    for sample in samples[first : first + SAMPLES_PER_SHARD]:
                        writer.write(sample)
            return len(samples)

        return seconds_of(work, len(samples))


def verify_ours(uri: str) -> float:
    """Every byte against the checksums, every header and key."""
    from mmflow.dataset.verify import verify_dataset

    # A line for each problem: with any, the pass counts too many samples.
    return seconds_of(lambda: count_of(uri) + len(verify_dataset(uri, decoded_samples=0)), count_of(uri))


def _samples(uri: str) -> Iterator[dict[str, Any]]:
    """The dataset's samples with all that a piece's row needs."""
    import json

    from mmflow.core.artifacts import canonical_json
    from mmflow.dataset.opened import open_dataset

    dataset = open_dataset(uri)
    for split in dataset.splits:
        for each in dataset.shards(split):
            tar = Path(dataset.tar_uri(each)).read_bytes()
            for row in dataset.index(each).to_pylist():
                for member in ("image", "txt", "json"):
                    row[member] = tar[row[f"{member}_offset"] :][: row[f"{member}_bytes"]]
                fields = json.loads(row["json"])
                metadata = canonical_json(fields["metadata"])
                yield {**row, "captions": fields["captions"], "metadata": metadata}


@contextmanager
def _memory() -> Iterator[Path]:
    """A folder on a memory file system, if the machine has one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
        yield Path(directory)
