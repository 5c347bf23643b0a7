"""Datasets written member by member, without the build, for tests of readers, verify and describe."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from PIL import Image

from mmflow.cleaning.captions import estimate_tokens
from mmflow.core.artifacts import canonical_json, commit
from mmflow.dataset.format import (
    QUARANTINE,
    SCHEMA,
    ShardCommit,
    ShardInfo,
    fingerprint_of,
    index_uri,
    quarantine_uri,
    read_index,
    shard_name,
    tar_uri,
    write_index,
    write_parquet,
)
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.tar import TarWriter


@dataclass(frozen=True, kw_only=True)
class Handmade:
    """A sample to write; its pictures are noise seeded by its key."""

    key: str
    captions: Sequence[Mapping[str, str]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (64, 48)
    num_frames: int = 1
    body: bytes | None = None  # in place of the first picture


def picture(seed: int, size: tuple[int, int], format: str = "JPEG") -> bytes:
    """Coarse noise of this (width, height), the same for the same seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(target, format)
    return target.getvalue()


def handmade(number: int) -> Handmade:
    """The sample with this number: one caption or two, every seventh a clip of three frames."""
    captions = [{"language": "en", "text": f"picture {number}"}, {"language": "zh", "text": f"图片 {number}"}]
    return Handmade(
        key=f"key-{number}",
        captions=captions[: 1 + number % 2],
        metadata={"number": number, **({"license": "CC0-1.0"} if number % 3 else {})},
        size=((64, 48), (48, 64), (80, 40))[number % 3],
        num_frames=3 if number % 7 == 6 else 1,
    )


def write_dataset(
    directory: Path, shards: Sequence[tuple[str, Sequence[Handmade]]], rejected: Sequence[Mapping[str, str]] = ()
) -> Dataset:
    """Write and commit one shard for each (split, samples); the rejected records belong to the first."""
    uri = str(directory)
    (directory / "shards").mkdir(parents=True)
    infos = []
    for number, (split, samples) in enumerate(shards):
        name = shard_name(number)
        with open(tar_uri(uri, name), "wb") as stream:
            tar = TarWriter(stream)
            entries = [{"row": row, **_add(tar, sample)} for row, sample in enumerate(samples)]
            checksum = tar.finish()
        info = ShardInfo(name=name, split=split, samples=len(samples), bytes=tar.bytes, checksum=checksum)
        marks = ShardCommit(plan="handmade", checksum=checksum, bytes=tar.bytes, samples=len(samples))
        write_index(index_uri(uri, name), pa.Table.from_pylist(entries, SCHEMA), marks)
        infos.append(info)
    if rejected:
        write_parquet(quarantine_uri(uri, shard_name(0)), pa.Table.from_pylist(list(rejected), QUARANTINE))
    splits = Counter[str]()
    for info in infos:
        splits[info.split] += info.samples
    totals = {
        "records": splits.total() + len(rejected),
        "samples": splits.total(),
        "quarantined": len(rejected),
        "bytes": sum(info.bytes for info in infos),
        "splits": dict(splits),
        "reasons": dict(Counter(row["reason"] for row in rejected)),
    }
    fields = {
        "fingerprint": fingerprint_of(infos),
        "shards": [asdict(info) for info in infos],
        "totals": totals,
        "sources": [{"name": "records.jsonl", "sha256": "0" * 64}],
        "settings": {"seed": 7},
    }
    commit(uri, "dataset", fields)
    return open_dataset(uri)


def _add(tar: TarWriter, sample: Handmade) -> dict[str, Any]:
    seed = xxhash.xxh3_64_intdigest(sample.key.encode())
    images = [picture(seed ^ frame, sample.size) for frame in range(sample.num_frames)]
    images[0] = images[0] if sample.body is None else sample.body
    fields = canonical_json({"captions": sample.captions, "metadata": sample.metadata}).encode()
    texts = [caption["text"] for caption in sample.captions]
    longest = max(texts, key=len, default="")
    entry: dict[str, Any] = {
        "key": sample.key,
        "image_extension": "jpg",
        "width": sample.size[0],
        "height": sample.size[1],
        "caption_tokens": estimate_tokens(longest),
        "caption_characters": len(longest),
        "languages": [caption["language"] for caption in sample.captions],
        "license": sample.metadata.get("license"),
        "pixel_hash": xxhash.xxh3_64_intdigest(images[0]),
        "perceptual_hash": seed,
        "caption_hashes": [xxhash.xxh3_64_intdigest(text.casefold().encode()) for text in texts],
    }
    text = texts[0] if texts else ""
    bodies = (("image", "jpg", images[0]), ("txt", "txt", text.encode()), ("json", "json", fields))
    for member, suffix, body in bodies:
        (entry[f"{member}_offset"],) = tar.add([(f"{sample.key}.{suffix}", body)])
        entry[f"{member}_bytes"] = len(body)
        entry[f"{member}_xxh3"] = xxhash.xxh3_64_intdigest(body)
    entry["frames"] = [
        {
            "offset": tar.add([(f"{sample.key}.{number:03d}.jpg", body)])[0],
            "bytes": len(body),
            "xxh3": xxhash.xxh3_64_intdigest(body),
        }
        for number, body in enumerate(images[1:], 1)
    ]
    return entry


def flip_bit(path: str | Path, offset: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)


def edit_index(dataset: Dataset, change: Callable[[list[dict[str, Any]]], object], name: str = "00000") -> None:
    """Change the rows of a shard's index in place; the commit of the shard stays."""
    path = index_uri(dataset.uri.removeprefix("fsspec+file://"), name)
    table, marks = read_index(path)
    rows = table.to_pylist()
    change(rows)
    write_index(path, table.from_pylist(rows, table.schema), marks)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


SHARD_SAMPLES = (9, 14, 0, 8)  # of split train; the third shard's records were all rejected


def small_sample(number: int) -> Handmade:
    """A sample with its own picture; its first caption contains its number."""
    captions = [{"language": "en", "text": f"picture {number}"}, {"language": "zh", "text": f"图片 {number}"}]
    return Handmade(
        key=f"key-{number}",
        captions=captions[: 1 + number % 2],
        metadata={"classes": {"group": f"group {number % 3}"}, "number": number},
        size=(40, 32),
    )


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """31 samples of split `train` in four shards, 5 of `dev`. Read only: a test that damages it works on a copy."""
    shards, number = [], 0
    for ordinal, samples in enumerate((*SHARD_SAMPLES, 5)):
        split = "train" if ordinal < len(SHARD_SAMPLES) else "dev"
        shards.append((split, [small_sample(number + row) for row in range(samples)]))
        number += samples
    return write_dataset(tmp_path_factory.mktemp("small") / "dataset", shards)
