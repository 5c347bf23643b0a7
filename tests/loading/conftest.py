"""A small dataset in a committed directory, written by the shard writer itself, without Ray."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmflow.artifacts import commit
from mmflow.ingest.config import CaptionConfig, ImageConfig
from mmflow.shards.dataset import Dataset, ShardInfo, fingerprint_of, open_dataset, shard_name
from mmflow.shards.write import write_shard

SHARD_SAMPLES = (9, 14, 0, 8)  # of split train; the third shard's records were all rejected


def record(root: Path, number: int) -> dict[str, Any]:
    """A row as the writer takes it; its picture is a colour of its own, its first caption names its number."""
    image = f"{number}.png"
    colour = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(np.kron(colour, np.ones((12, 12, 1), np.uint8))).save(root / image)
    captions = [{"language": "en", "text": f"picture {number}"}, {"language": "zh", "text": f"图片 {number}"}]
    return {
        "source": f"records.jsonl:{number}",
        "root": str(root),
        "key": f"key-{number}",
        "image": image,
        "captions": captions[: 1 + number % 2],
        "metadata": json.dumps({"classes": {"group": f"group {number % 3}"}, "number": number}),
        "reason": None,
        "detail": None,
        "place": number,
        "claim": False,
    }


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """31 samples of split `train` in four shards, 5 of `dev`. Read only: a test that damages it works on a copy."""
    root, uri = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("dataset")
    infos, number = [], 0
    for ordinal, samples in enumerate((*SHARD_SAMPLES, 5)):
        rows = [record(root, number + row) for row in range(samples)]
        number += samples
        name = shard_name(ordinal)
        written = write_shard(str(uri), name, rows, ImageConfig(side=32), CaptionConfig())
        split = "train" if ordinal < len(SHARD_SAMPLES) else "dev"
        infos.append(ShardInfo(name=name, split=split, samples=samples, bytes=written.bytes, checksum=written.checksum))
    manifest = {"fingerprint": fingerprint_of(infos), "shards": [asdict(info) for info in infos]}
    commit(str(uri), "dataset", manifest)
    return open_dataset(str(uri))
