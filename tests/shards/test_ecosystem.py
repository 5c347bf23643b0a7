"""The tars are everyone's: other tools read the same keys, pictures and captions from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmflow.shards.dataset import Dataset
from tests.shards.conftest import Corpus

READ_WITH_WEBDATASET = """
import sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode("pil"):
    print(sample["__key__"], sample["jpg"].size, sample["txt"], len(sample["json"]["captions"]), sep="|")
"""


def tars(dataset: Dataset) -> list[str]:
    return [dataset.tar_uri(shard) for split in dataset.splits for shard in dataset.shards(split)]


def test_webdataset_reads_a_brace_range_in_secure_mode(dataset: Dataset, corpus: Corpus) -> None:
    braces = f"{dataset.uri}/shards/{{00000..{len(tars(dataset)) - 1:05d}}}.tar"
    found = subprocess.run(
        [sys.executable, "-c", READ_WITH_WEBDATASET, braces],
        env={**os.environ, "WDS_SECURE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert sorted(found) == sorted(
        f"{key}|(64, 48)|{captions[0]['text']}|{len(captions)}" for key, captions in corpus.captions_of_key.items()
    )


def test_hugging_face_datasets_reads_them(
    dataset: Dataset, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": tars(dataset)}, split="train", cache_dir=str(tmp_path)
    )
    assert {row["__key__"]: row["json"]["captions"] for row in loaded} == corpus.captions_of_key
    assert {row["jpg"].size for row in loaded} == {(64, 48)}
    assert all(row["txt"] == row["json"]["captions"][0]["text"] for row in loaded)
