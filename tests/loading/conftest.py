"""A small dataset in a committed directory, written member by member, without Ray."""

from __future__ import annotations

import pytest

from mmflow.dataset.opened import Dataset
from tests.dataset.handmade import Handmade, write_dataset

SHARD_SAMPLES = (9, 14, 0, 8)  # of split train; the third shard's records were all rejected


def sample(number: int) -> Handmade:
    """Its picture is a pattern of its own, its first caption names its number."""
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
        shards.append((split, [sample(number + row) for row in range(samples)]))
        number += samples
    return write_dataset(tmp_path_factory.mktemp("loading") / "dataset", shards)
