"""A teacher's stored embeddings, which the student reads row by row through memory maps.

    <cache>/rows/00000.npy …   (samples, augmentations, 2, width): row i belongs to sample i of that shard, image first
    <cache>/manifest.json      dataset fingerprint, teacher digest, precision, logit scale, checksum of each file

numpy has no bf16: it is stored as the uint16 of its bits.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from mmflow.core.artifacts import read_artifact
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.core.storage import join, local_path, read_bytes

# Shapes: B rows of a batch, E the teacher's width of the shared space.

KIND = "teacher_cache"
DTYPES: Mapping[str, tuple[torch.dtype, type[np.generic]]] = {
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.uint16),
}
"""By precision the type of the numbers, and the type that they are stored as."""

OPEN_FILES = 256  # each map holds a file descriptor


class CachedTeacher:
    """The caches of one teacher: one for each dataset of a stage, the stage's own first."""

    def __init__(self, uris: Sequence[str], datasets: Sequence[str], digest: str) -> None:
        """`datasets` are fingerprints, `digest` is the teacher's. Raises CorruptArtifactError for a cache of another
        dataset or teacher, MissingArtifactError if there is none."""
        self._uris = tuple(uris)
        self._manifests = [read_artifact(uri, KIND).manifest for uri in uris]
        for uri, manifest, fingerprint in zip(uris, self._manifests, datasets, strict=True):
            for name, expected in (("dataset", fingerprint), ("teacher", digest)):
                if manifest[name] != expected:
                    raise CorruptArtifactError(
                        f"{uri}: made of {name} {manifest[name][:12]}, but this stage has {expected[:12]}; delete it "
                        "and rerun"
                    )
        self.width = int(self._manifests[0]["width"])
        self._logit_scale = torch.tensor([self._manifests[0]["logit_scale"]])
        self._checked: set[tuple[int, int]] = set()
        self._rows = lru_cache(OPEN_FILES)(self._open)

    def read(self, places_B4: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Image and text embeddings (B, E) fp32 and the logit scale (1,) of rows at (dataset, shard, row, view).

        Raises CorruptArtifactError for a damaged file.
        """
        embeddings_B2E = torch.empty(len(places_B4), 2, self.width)
        shards, shard_of_B = np.unique(places_B4[:, :2], axis=0, return_inverse=True)
        for number, (dataset, shard) in enumerate(shards.tolist()):
            chosen = np.flatnonzero(shard_of_B.reshape(-1) == number)
            rows = np.ascontiguousarray(self._rows(dataset, shard)[places_B4[chosen, 2], places_B4[chosen, 3]])
            dtype, _ = DTYPES[self._manifests[dataset]["precision"]]
            embeddings_B2E[torch.from_numpy(chosen)] = torch.from_numpy(rows).view(dtype).float()
        return embeddings_B2E[:, 0], embeddings_B2E[:, 1], self._logit_scale

    def _open(self, dataset: int, shard: int) -> NDArray[Any]:
        entry = self._manifests[dataset]["files"][shard]
        uri = file_uri(self._uris[dataset], entry["name"])
        rows = open_rows(uri)
        if (dataset, shard) not in self._checked:
            if checksum(rows) != entry["checksum"]:
                raise CorruptArtifactError(f"{uri}: damaged; delete {self._uris[dataset]} and rerun")
            self._checked.add((dataset, shard))
        return rows


def file_uri(uri: str, shard: str) -> str:
    """<cache>/rows/<shard>.npy"""
    return join(uri, "rows", f"{shard}.npy")


def open_rows(uri: str) -> NDArray[Any]:
    """The rows of a shard: mapped from a local disk, or read into memory from an object store. Raises
    CorruptArtifactError for a truncated file or one of another kind."""
    path = local_path(uri)
    source = io.BytesIO(read_bytes(uri)) if path is None else path
    try:
        rows: NDArray[Any] = np.load(source, mmap_mode=None if path is None else "r", allow_pickle=False)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file; delete the cache and rerun") from error
    except (ValueError, OSError) as error:
        raise CorruptArtifactError(f"{uri}: damaged ({error}); delete the cache and rerun") from error
    return rows


def checksum(rows: NDArray[Any]) -> str:
    """xxh3_128 (hex) of the stored numbers."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(rows).data.cast("B"))
