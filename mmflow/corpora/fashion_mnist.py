"""The corpus of classes: Fashion-MNIST (Xiao et al., arXiv 1708.07747) as Debian packages it, 70,000 articles of ten
kinds at 28 pixels.

A picture's caption is the name of its class: that is all that anybody said of it.
"""

from __future__ import annotations

import gzip
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmflow.core.errors import MisuseError
from mmflow.corpora.debian import package_tree
from mmflow.corpora.record_lines import record_lines

PACKAGES = ("dataset-fashion-mnist",)
INSTALLED = PurePosixPath("usr/share/datasets/fashion-mnist")
LICENSE = "MIT"
FILES = {"train": "train", "test": "t10k"}  # split → what the names of its two files begin with
IMAGES, LABELS = "images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"
# By number, as the dataset's own README lists them.
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IDX_UINT8 = 8  # the third byte of an IDX file: its values are unsigned bytes
MOST_BYTES = 64 << 20  # of an unpacked file; the largest has 47 MB


def write_fashion_mnist(
    directory: Path, *, package_directory: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> int:
    """Write the pictures as PNG into `directory/images` and their classes into `records.jsonl`; return their number.

    `package_directory` holds the package's four files, or its .deb; without it the package client downloads that.
    `records.jsonl`, train before test and each in the order of the files, appears last and whole: a directory with it
    is a complete corpus. `progress(done, total)` is called after each picture.

    Raises MisuseError where neither a package client nor a usable directory is there, or a file is damaged.
    """
    scratch = directory / ".unpacked"
    shutil.rmtree(scratch, ignore_errors=True)  # by a run that was killed
    scratch.mkdir(parents=True)
    try:
        tree = package_tree(
            scratch,
            PACKAGES,
            corpus="fashion_mnist",
            under=INSTALLED,
            parts=[f"{name}-{kind}" for name in FILES.values() for kind in (IMAGES, LABELS)],
            package_directory=package_directory,
        )
        splits = {split: _read_split(tree, name) for split, name in FILES.items()}
    finally:
        shutil.rmtree(scratch)
    total = sum(len(labels_N) for _, labels_N in splits.values())
    (directory / "images").mkdir(exist_ok=True)
    done = 0
    with record_lines(directory) as write:
        for split, (images_NHW, labels_N) in splits.items():
            for number, (image_HW, label) in enumerate(zip(images_NHW, labels_N.tolist(), strict=True)):
                key, name = f"{split}-{number:05d}", CLASSES[label]
                Image.fromarray(image_HW).save(directory / "images" / f"{key}.png")
                record = {
                    "key": key,
                    "image": f"images/{key}.png",
                    "captions": [{"language": "en", "text": name}],
                    "split": split,
                    "classes": {"article": name},
                    "license": LICENSE,
                }
                write(record)
                done += 1
                if progress is not None:
                    progress(done, total)
    return done


def _read_split(tree: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures (N, H, W) and the numbers of their classes (N,)."""
    images_NHW, labels_N = read_idx(tree / f"{name}-{IMAGES}", 3), read_idx(tree / f"{name}-{LABELS}", 1)
    if len(images_NHW) != len(labels_N) or labels_N.max(initial=0) >= len(CLASSES):
        raise MisuseError(
            f"{tree}: {len(images_NHW)} pictures and {len(labels_N)} labels up to {labels_N.max(initial=0)} for {name}"
            f" are no Fashion-MNIST, which has as many of both, from 0 to {len(CLASSES) - 1}; download it again"
        )
    return images_NHW, labels_N


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of a gzipped IDX file (yann.lecun.com/exdb/mnist) of unsigned bytes, of so many dimensions.

    Raises MisuseError for a file that is none, or is cut short.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise MisuseError(f"{path}: not a gzip file that can be read ({error}); download it again") from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[place : place + 4], "big") for place in range(4, start, 4)]
    if data[:4] != bytes([0, 0, IDX_UINT8, dimensions]) or len(data) != start + math.prod(shape):
        raise MisuseError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; download it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
