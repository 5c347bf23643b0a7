"""`make bench`: mmflow beside its peers, in one run, on one core; medians and ratios, written to RESULTS.md."""

from __future__ import annotations

import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import simplejpeg
import webdataset

from mmflow.artifacts import commit
from mmflow.ingest.images import EncodedImage
from mmflow.loading.reader import Reader
from mmflow.shards.dataset import ShardInfo, fingerprint_of, index_uri, open_dataset, tar_uri
from mmflow.shards.index import SCHEMA, ShardCommit, write_index
from mmflow.shards.tar import TarWriter
from mmflow.shards.verify import verify_dataset
from mmflow.shards.write import Sample, add_sample

RUNS = 5
NUM_SAMPLES = 5_000
IMAGE_SIDE = 224
RESULTS = Path(__file__).parent / "RESULTS.md"


def make_samples() -> list[tuple[str, bytes, bytes, bytes]]:
    """(key, jpeg, txt, json) of noise pictures, about 30 KB each."""
    random = np.random.default_rng(0)
    pictures = [
        simplejpeg.encode_jpeg(np.kron(random.integers(0, 256, (56, 56, 3), np.uint8), np.ones((4, 4, 1), np.uint8)))
        for _ in range(50)
    ]
    caption = b"a picture of nothing in particular"
    fields = b'{"captions":[{"language":"en","text":"a picture of nothing in particular"}],"metadata":{}}'
    return [(f"{number:08d}", pictures[number % 50], caption, fields) for number in range(NUM_SAMPLES)]


def write_ours(directory: Path, samples: list[tuple[str, bytes, bytes, bytes]]) -> None:
    """Tar, index with a hash of each body, checksum of the whole, manifest."""
    uri = str(directory)
    (directory / "shards").mkdir(parents=True)
    rows = []
    with open(tar_uri(uri, "00000"), "wb") as stream:
        tar = TarWriter(stream)
        for number, (key, image, txt, fields) in enumerate(samples):
            encoded = EncodedImage(data=image, extension="jpg", width=IMAGE_SIDE, height=IMAGE_SIDE)
            row = add_sample(tar, key, Sample(image=encoded, txt=txt, json=fields, caption_tokens=8))
            rows.append({**row, "row": number})
        checksum = tar.finish()
    marks = ShardCommit(plan="", checksum=checksum, bytes=tar.bytes, samples=len(rows))
    write_index(index_uri(uri, "00000"), pa.Table.from_pylist(rows, SCHEMA), marks)
    shard = {"name": "00000", "split": "train", "samples": len(rows), "bytes": tar.bytes, "checksum": checksum}
    totals = {"records": len(rows), "samples": len(rows), "quarantined": 0, "bytes": tar.bytes}
    totals |= {"splits": {"train": len(rows)}, "reasons": {}}
    print_of = fingerprint_of([ShardInfo(**shard)])  # type: ignore[arg-type]
    commit(uri, "dataset", {"fingerprint": print_of, "shards": [shard], "totals": totals})


def write_webdataset(path: Path, samples: list[tuple[str, bytes, bytes, bytes]]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for key, image, txt, fields in samples:
            writer.write({"__key__": key, "jpg": image, "txt": txt, "json": fields})


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def compare(name: str, ours: Callable[[], object], peer_name: str, peer: Callable[[], object]) -> str:
    """A row of the table: both in turn, `RUNS` times, after one run of each that does not count."""
    ours(), peer()
    pairs = [(cpu_seconds(ours), cpu_seconds(peer)) for _ in range(RUNS)]
    mine, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    rates = f"{NUM_SAMPLES / mine:,.0f} | {peer_name} | {NUM_SAMPLES / theirs:,.0f}"
    return f"| {name} | {rates} | {ratio:.1f}× |"


def main() -> None:
    samples = make_samples()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        counter = iter(range(1_000_000))
        write_ours(root / "dataset", samples)
        dataset = open_dataset(str(root / "dataset"))
        tar = tar_uri(dataset.uri, "00000")

        def read_peer() -> int:
            return sum(1 for _ in webdataset.WebDataset(tar, shardshuffle=False, empty_check=False))

        rows = [
            compare(
                "write tar, index, hashes and checksum",
                lambda: write_ours(root / f"ours-{next(counter)}", samples),
                "webdataset.TarWriter",
                lambda: write_webdataset(root / f"peer-{next(counter)}.tar", samples),
            ),
            compare("read, hashes checked, no decode", lambda: list(Reader(dataset, "train")), "webdataset", read_peer),
            compare(
                "verify every byte, no decode",
                lambda: verify_dataset(dataset.uri, decoded_samples=0),
                "webdataset, iterating",
                read_peer,
            ),
        ]
    size = len(samples[0][1])
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    names = ("mmflow", "webdataset", "pyarrow", "xxhash", "numpy")
    page = io.StringIO()
    page.write("# Beside peers\n\nWritten by `make bench`: both sides in turn in one process, one core, medians of ")
    page.write(
        f"{RUNS} runs after a warm-up; samples per CPU-second, {NUM_SAMPLES:,} samples of {size / 1000:.0f} KB.\n\n"
    )
    page.write("| what | mmflow | peer | peer's | ratio |\n| --- | --- | --- | --- | --- |\n")
    page.write("\n".join(rows) + "\n\n")
    page.write(f"{machine}; {', '.join(f'{name} {version(name)}' for name in names)}.\n")
    RESULTS.write_text(page.getvalue())
    print(page.getvalue())


if __name__ == "__main__":
    main()
