"""The Fashion-MNIST corpus: pixels and labels are unchanged, and a damaged file is named."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmflow.core.errors import MisuseError
from mmflow.corpora.fashion_mnist import CLASSES, IMAGES, INSTALLED, LABELS
from tests.corpora.made import deb, write_files, written

NUM_OF_SPLIT = {"train": 12, "t10k": 3}


def idx(values: NDArray[np.uint8]) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    return gzip.compress(head + values.tobytes(), mtime=0)


def pixels(name: str) -> NDArray[np.uint8]:
    return np.random.default_rng(len(name)).integers(0, 256, (NUM_OF_SPLIT[name], 28, 28), np.uint8)


def labels(name: str) -> NDArray[np.uint8]:
    return (np.arange(NUM_OF_SPLIT[name], dtype=np.uint8) * 3) % len(CLASSES)


def files() -> dict[str, bytes]:
    images = {f"{name}-{IMAGES}": idx(pixels(name)) for name in NUM_OF_SPLIT}
    return images | {f"{name}-{LABELS}": idx(labels(name)) for name in NUM_OF_SPLIT}


def package() -> dict[str, bytes]:
    installed = {f"./{INSTALLED}/{name}": body for name, body in files().items()}
    return {"dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb": deb(installed)}


@pytest.mark.parametrize("contents", [files, package])
def test_every_picture_keeps_its_pixels_class_and_split(
    tmp_path: Path, contents: Callable[[], dict[str, bytes]]
) -> None:
    corpus = tmp_path / "corpus"
    records = written(corpus, "fashion_mnist", package_directory=write_files(tmp_path / "packages", contents()))
    assert len(records) == 15
    assert [record["key"] for record in records][-4:] == ["train-00011", "test-00000", "test-00001", "test-00002"]
    for record in records:
        split, number = record["key"].split("-")
        name = {"train": "train", "test": "t10k"}[split]
        article = CLASSES[labels(name)[int(number)]]
        assert (record["split"], record["classes"]) == (split, {"article": article})
        assert record["captions"] == [{"language": "en", "text": article}]
        with Image.open(corpus / record["image"]) as image:
            assert np.array_equal(np.asarray(image), pixels(name)[int(number)])


def recompressed(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda body: gzip.compress(change(gzip.decompress(body)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda body: body[:-20], "not a gzip file that can be read"),
        (gzip.decompress, "not a gzip file that can be read"),
        (recompressed(lambda idx: idx[:-1]), "not an IDX file of bytes in 1 dimensions"),
        (recompressed(lambda idx: idx[:2] + b"\x0d" + idx[3:]), "not an IDX file of bytes in 1 dimensions"),  # floats
        (lambda _: idx(pixels("train")), "not an IDX file of bytes in 1 dimensions"),
        (lambda _: idx(labels("train")[:-1]), "12 pictures and 11 labels"),
        (lambda _: idx(labels("train") + 1), "labels up to 10; Fashion-MNIST has"),
    ],
)
def test_a_damaged_file_is_named_and_no_corpus_is_written(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    name = f"train-{LABELS}"
    directory = write_files(tmp_path / "files", files() | {name: damage(files()[name])})
    with pytest.raises(MisuseError, match=f"{directory}.*{message}"):
        written(tmp_path / "corpus", "fashion_mnist", package_directory=directory)
    assert not (tmp_path / "corpus" / "records.jsonl").exists()
