"""The corpus of classes, of made files: pixels and labels as they are, and a damaged file named."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmflow.core.errors import MisuseError
from mmflow.corpora.fashion_mnist import CLASSES, IMAGES, INSTALLED, LABELS, read_idx
from tests.corpora.made import ar, written

NUM_OF_SPLIT = {"train": 12, "t10k": 3}


def idx(values: NDArray[np.uint8]) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    return gzip.compress(head + values.tobytes(), mtime=0)


def pixels(name: str) -> NDArray[np.uint8]:
    return np.random.default_rng(len(name)).integers(0, 256, (NUM_OF_SPLIT[name], 28, 28), np.uint8)


def labels(name: str) -> NDArray[np.uint8]:
    return (np.arange(NUM_OF_SPLIT[name], dtype=np.uint8) * 3) % len(CLASSES)


def write_files(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in NUM_OF_SPLIT:
        (directory / f"{name}-{IMAGES}").write_bytes(idx(pixels(name)))
        (directory / f"{name}-{LABELS}").write_bytes(idx(labels(name)))
    return directory


def write_package(directory: Path) -> Path:
    """The same files as a .deb."""
    stream = io.BytesIO()
    files = write_files(directory / "files")
    with tarfile.open(fileobj=stream, mode="w:xz") as tar:
        for path in files.iterdir():
            tar.add(path, f"./{INSTALLED}/{path.name}")
    package = ar({"debian-binary": b"2.0\n", "control.tar.gz": b"odd", "data.tar.xz": stream.getvalue()})
    (directory / "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb").write_bytes(package)
    return directory


@pytest.mark.parametrize("lie", [write_files, write_package])
def test_every_picture_keeps_its_pixels_its_class_and_its_split(tmp_path: Path, lie: Callable[[Path], Path]) -> None:
    corpus = tmp_path / "corpus"
    records = written(corpus, "fashion_mnist", package_directory=lie(tmp_path / "packages"))
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
        (lambda _: idx(labels("train")[:-1]), "12 pictures and 11 labels"),
        (lambda _: idx(labels("train") + 1), "labels up to 10; Fashion-MNIST has"),
    ],
)
def test_a_damaged_file_is_named_and_leaves_no_corpus(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    files = write_files(tmp_path / "files")
    path = files / f"train-{LABELS}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MisuseError, match=f"{files}.*{message}"):
        written(tmp_path / "corpus", "fashion_mnist", package_directory=files)
    assert not (tmp_path / "corpus" / "records.jsonl").exists()


def test_a_file_of_other_dimensions_is_refused(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files")
    assert read_idx(files / f"t10k-{IMAGES}", 3).shape == (3, 28, 28)
    with pytest.raises(MisuseError, match="not an IDX file of bytes in 1 dimensions"):
        read_idx(files / f"t10k-{IMAGES}", 1)
