"""Other tools read the same keys, pictures and captions from our tars."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmflow.dataset.opened import Dataset
from tests.dataset.conftest import Corpus

READ_WITH_WEBDATASET = """
import sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode("pil"):
    print(sample["__key__"], sample["jpg"].size, sample["txt"], len(sample["json"]["captions"]), sep="|")
"""

# open_clip's data pipeline, called like in `open_clip_train.main`. It imports torchvision, which has no build for CPU
# torch, only for ImageFolder datasets. It does not expect the end marks of shards of webdataset >= 0.2.90.
READ_WITH_OPEN_CLIP = """
import sys, types
for name in ("torchvision", "torchvision.datasets"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"]
from open_clip_train import data
expand = data.tar_file_expander
data.tar_file_expander = lambda *args, **options: (file for file in expand(*args, **options) if "fname" in file)
shards, num_samples, training = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "train"
args = types.SimpleNamespace(
    train_data=shards, val_data=shards, train_num_samples=num_samples, val_num_samples=num_samples, batch_size=1,
    workers=0, world_size=1, seed=3, dataset_resampled=False, train_data_upsampling_factors=None,
)
loader = data.get_wds_dataset(args, lambda image: image.size, training, tokenizer=lambda text: [text]).dataloader
for sizes, texts in loader:
    for size, text in zip(sizes, texts):
        print(tuple(map(int, size)), text, sep="|")
"""


def tars(dataset: Dataset) -> list[str]:
    return [dataset.tar_uri(shard) for split in dataset.splits for shard in dataset.shards(split)]


def test_webdataset_reads_the_tars_in_secure_mode(dataset: Dataset, corpus: Corpus) -> None:
    braces = f"{dataset.uri}/shards/{{00000..{len(tars(dataset)) - 1:05d}}}.tar"
    lines = subprocess.run(
        [sys.executable, "-c", READ_WITH_WEBDATASET, braces],
        env={**os.environ, "WDS_SECURE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert sorted(lines) == sorted(
        f"{key}|(64, 48)|{captions[0]['text']}|{len(captions)}" for key, captions in corpus.captions_of_key.items()
    )


def test_hugging_face_datasets_reads_the_tars(
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


@pytest.mark.parametrize("use", ["train", "validate"])
def test_open_clip_trains_and_validates_on_the_tars(dataset: Dataset, corpus: Corpus, use: str) -> None:
    pytest.importorskip("open_clip_train", reason="pip install --no-deps open-clip-torch")
    braces = f"{dataset.uri}/shards/{{00000..{len(tars(dataset)) - 1:05d}}}.tar"
    num_samples = len(corpus.captions_of_key)
    lines = subprocess.run(
        [sys.executable, "-c", READ_WITH_OPEN_CLIP, braces, str(num_samples), use],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {f"(64, 48)|{captions[0]['text']}" for captions in corpus.captions_of_key.values()}
    assert set(lines) == expected
    assert len(lines) == num_samples
