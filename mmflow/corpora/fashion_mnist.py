"""Fashion-MNIST (Xiao et al., arXiv 1708.07747) as Debian packages it: 70,000 articles of ten kinds at 28 pixels.

A picture's caption is the name of its class: nothing else is known of it.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mmflow.core.config import OPERATIONAL, Config
from mmflow.core.errors import MisuseError
from mmflow.corpora.packages import debian_tree, scratch_directory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES = ("dataset-fashion-mnist",)
INSTALLED = PurePosixPath("usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "test": "t10k"}  # split → what the names of its two files begin with
IMAGES, LABELS = "images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"
# By number, as the dataset's own README lists them.
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
IDX_UINT8 = 8  # the third byte of an IDX file of unsigned bytes
MAX_FILE_BYTES = 64 << 20  # unpacked; the largest has 47 MB


class FashionMnistConfig(Config):
    """Pictures of ten classes, from a Debian package: the package client downloads 31 MB."""

    name: Literal["fashion_mnist"]
    """fashion_mnist: 70,000 articles of clothing, their class as `article` and as their caption; splits train, test."""
    package_directory: Annotated[str | None, OPERATIONAL] = None
    """Folder with the package's four files or its .deb file, where apt-get cannot download it."""

    def write(self, directory: Path, progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
        """Write the pictures as PNG to `images/`; their records, train before test, in the order of the files."""
        from PIL import Image

        with scratch_directory(directory) as scratch:
            tree = debian_tree(
                PACKAGES,
                scratch,
                corpus=self.name,
                under=INSTALLED,
                parts=[f"{name}-{kind}" for name in FILES.values() for kind in (IMAGES, LABELS)],
                package_directory=self.package_directory,
            )
            splits = {split: _read_split(tree, name) for split, name in FILES.items()}
        total = sum(len(labels_N) for _, labels_N in splits.values())
        (directory / "images").mkdir(exist_ok=True)
        done = 0
        for split, (images_NHW, labels_N) in splits.items():
            for number, (image_HW, label) in enumerate(zip(images_NHW, labels_N.tolist(), strict=True)):
                key, name = f"{split}-{number:05d}", CLASSES[label]
                Image.fromarray(image_HW).save(directory / "images" / f"{key}.png")
                yield {
                    "key": key,
                    "image": f"images/{key}.png",
                    "captions": [{"language": "en", "text": name}],
                    "split": split,
                    "classes": {"article": name},
                    "license": "MIT",
                }
                done += 1
                progress(done, total)


def _read_split(tree: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures (N, H, W) and the numbers of their classes (N,)."""
    images_NHW, labels_N = read_idx(tree / f"{name}-{IMAGES}", 3), read_idx(tree / f"{name}-{LABELS}", 1)
    if len(images_NHW) != len(labels_N) or labels_N.max(initial=0) >= len(CLASSES):
        raise MisuseError(
            f"{tree}: {name} has {len(images_NHW)} pictures and {len(labels_N)} labels up to {labels_N.max(initial=0)};"
            f" Fashion-MNIST has as many labels as pictures, from 0 to {len(CLASSES) - 1}; download it again"
        )
    return images_NHW, labels_N


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of a gzipped IDX file (yann.lecun.com/exdb/mnist) of unsigned bytes.

    Raises MisuseError for another file, or one that is cut short.
    """
    import numpy as np

    try:
        with gzip.open(path) as file:
            data = file.read(MAX_FILE_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise MisuseError(f"{path}: not a gzip file that can be read ({error}); download it again") from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[place : place + 4], "big") for place in range(4, start, 4)]
    if data[:4] != bytes([0, 0, IDX_UINT8, dimensions]) or len(data) != start + math.prod(shape):
        raise MisuseError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; download it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
