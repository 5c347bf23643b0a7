"""An index for scores of millions of rows: an inverted file (IVF), which compares a query with a part of them.

A quantizer, trained once by faiss's k-means, divides the rows into lists of neighbours. A search reads only the lists
that are nearest to the query, from one file in which the rows stand list by list. Every file of scores keeps which list
each of its rows is in, under the file's sha256: when a dataset has grown, only the new files are compared with the
quantizer, and the lists are merged again. One directory serves any number of scores.

    <directory>/<model digest>-<pictures or captions>-<width>-<lists>/
      quantizer.npy                      (L, W) float32
      <hash of the quantizer>/
        <sha256 of a file>.npy           (rows,) int32: the list of each row; -1 for a row without an embedding
        <hash of all files>/             the merged lists
          vectors.npy positions.npy      (N, W) float16 and (N,) int64
          starts.npy                     (L + 1,) int64: where each list starts; written last

Not faiss's own files, in which each file's part and the merged index would hold the vectors once more each, and which
faiss-cpu searches without the GPU.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmflow.core.artifacts import content_hash, exclusive
from mmflow.core.errors import CorruptArtifactError, MisuseError
from mmflow.core.progress import Report
from mmflow.core.storage import file_sha256, local_path, publish
from mmflow.inference.scores import BLOCK_ROWS, Block, ScoreFile, Scores, Side
from mmflow.inference.search import Best, Floats, best_rows

WORTHWHILE_ROWS = 1_000_000  # below, an exact search takes seconds
# One list in so many is searched. Recall of the exact top 10 among 4,000 emoji in 64 lists was 0.97 for texts and 0.99
# for pictures, with half as many 0.91 and 0.97; at the same share, more lists have a higher recall.
PROBED_SHARE = 8
ROWS_PER_LIST = 64  # that k-means is trained on; faiss asks for 39 at least
ITERATIONS = 10  # of k-means
QUANTIZER, VECTORS, POSITIONS, STARTS = "quantizer.npy", "vectors.npy", "positions.npy", "starts.npy"

# Shapes: N rows, L lists, W width of the embeddings.

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class Index:
    """A built index. The vectors stay on the disk."""

    quantizer_LW: Floats
    vectors_NW: NDArray[np.float16]
    positions_N: NDArray[np.int64]
    starts_L: NDArray[np.int64]  # one more than lists

    def search(self, query_W: Floats, top: int) -> Best:
        """The `top` rows among those in the lists nearest to the query; in more lists if those have too few."""
        nearest = np.argsort(-(self.quantizer_LW @ query_W), kind="stable")
        rows_in_nearest = np.diff(self.starts_L)[nearest].cumsum()
        probed = max(math.ceil(len(nearest) / PROBED_SHARE), int(np.searchsorted(rows_in_nearest, top)) + 1)
        return best_rows(self._blocks(np.sort(nearest[:probed])), query_W, top)

    def _blocks(self, lists: NDArray[np.int64]) -> Iterator[Block]:
        rows = np.concatenate([np.arange(self.starts_L[number], self.starts_L[number + 1]) for number in lists])
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            yield self.positions_N[block], self.vectors_NW[block]


def open_index(directory: str, scores: Scores, side: Side, width: int, progress: Report) -> Index:
    """The index of the scores in a local directory, after building what is missing of it.

    Raises MisuseError for a remote directory, for too few rows or without faiss, BusyArtifactError while another
    process builds there, and as `Scores.vectors`.
    """
    root = local_path(directory)
    if root is None:
        raise MisuseError(f"{directory}: an index is searched on a local disk; name a directory on this machine")
    num_lists = 4 ** max(1, round(math.log(math.sqrt(scores.rows), 4)))  # another number once rows grow sixteenfold
    folder = root / f"{scores.digest[:16]}-{side}-{width}-{num_lists}"
    index = _find(folder, scores)
    if index is None:
        with exclusive(str(folder)):
            index = _find(folder, scores) or _build(folder, scores, side, num_lists, progress)
    return index


def _find(folder: Path, scores: Scores) -> Index | None:
    quantizer_LW = _load(folder / QUANTIZER, np.float32, 2)
    return None if quantizer_LW is None else _read(_merged(folder, scores, quantizer_LW), quantizer_LW)


def _merged(folder: Path, scores: Scores, quantizer_LW: Floats) -> Path:
    quantizer = hashlib.sha256(quantizer_LW.tobytes()).hexdigest()
    return folder / quantizer[:16] / content_hash([file.sha256 for file in scores.files])[:16]


def _build(folder: Path, scores: Scores, side: Side, num_lists: int, progress: Report) -> Index:
    quantizer_LW = _load(folder / QUANTIZER, np.float32, 2)
    if quantizer_LW is None:
        quantizer_LW = _train(scores, side, num_lists, progress)
        _save(folder / QUANTIZER, quantizer_LW)
    merged = _merged(folder, scores, quantizer_LW)
    for done, file in enumerate(scores.files):
        progress(done, len(scores.files), "files assigned to lists")
        _assign(merged.parent, scores, file, side, quantizer_LW)
    _merge(merged, scores, side, quantizer_LW, progress)
    index = _read(merged, quantizer_LW)
    assert index is not None
    return index


def _read(merged: Path, quantizer_LW: Floats) -> Index | None:
    starts = _load(merged / STARTS, np.int64, 1)
    vectors, positions = _load(merged / VECTORS, np.float16, 2), _load(merged / POSITIONS, np.int64, 1)
    if starts is None or vectors is None or positions is None:
        return None
    whole = len(starts) == len(quantizer_LW) + 1 and starts[-1] == len(vectors) == len(positions)
    return Index(quantizer_LW, vectors, positions, starts) if whole else None


def _train(scores: Scores, side: Side, num_lists: int, progress: Report) -> Floats:
    try:
        import faiss
    except ImportError as error:
        raise MisuseError("an index needs faiss, which is not installed: pip install 'mmflow[search]'") from error
    step = max(1, scores.rows // (ROWS_PER_LIST * num_lists))
    sampled = []
    for done, file in enumerate(scores.files):
        progress(done, len(scores.files), "files sampled")
        sampled += [vectors[positions % step == 0] for positions, vectors in scores.vectors(file, side)]
    sample_NW = np.concatenate(sampled).astype(np.float32) if sampled else np.zeros((0, 1), np.float32)
    progress(len(scores.files), len(scores.files), f"files sampled, now k-means of {num_lists:,} lists")
    if len(sample_NW) < num_lists:
        raise MisuseError(f"{scores.uri}: {len(sample_NW)} embeddings are too few for an index; search without it")
    kmeans = faiss.Kmeans(
        sample_NW.shape[1], num_lists, niter=ITERATIONS, spherical=True, seed=0, min_points_per_centroid=1
    )
    kmeans.train(sample_NW)
    centroids_LW: Floats = np.asarray(kmeans.centroids, np.float32)
    return centroids_LW


def _assign(assigned: Path, scores: Scores, file: ScoreFile, side: Side, quantizer_LW: Floats) -> NDArray[np.int32]:
    """The list of each row of a file, computed if it is not there."""
    path = assigned / f"{file.sha256}.npy"
    kept_N = _load(path, np.int32, 1)
    if kept_N is not None and len(kept_N) == file.rows:
        return kept_N
    if file_sha256(file.uri) != file.sha256:
        raise CorruptArtifactError(f"{file.uri}: changed since it was committed; score the dataset again")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantizer_WL = torch.tensor(quantizer_LW).to(device).T
    lists_N = np.full(file.rows, -1, np.int32)
    for positions, vectors in scores.vectors(file, side):
        similarities = torch.tensor(vectors).to(device, torch.float32) @ quantizer_WL
        lists_N[positions - file.start] = similarities.argmax(1).cpu().numpy()
    _save(path, lists_N)
    return lists_N


def _merge(merged: Path, scores: Scores, side: Side, quantizer_LW: Floats, progress: Report) -> None:
    """Write the rows of all files list by list, and remove the lists merged before."""
    num_lists, width = quantizer_LW.shape
    counts = np.zeros(num_lists, np.int64)
    for file in scores.files:
        lists_N = _assign(merged.parent, scores, file, side, quantizer_LW)
        counts += np.bincount(lists_N[lists_N >= 0], minlength=num_lists)
    starts = np.concatenate([[0], counts.cumsum()])
    for old in merged.parent.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    merged.mkdir(parents=True)
    vectors = _new(merged / VECTORS, np.float16, (int(starts[-1]), width))
    places = _new(merged / POSITIONS, np.int64, (int(starts[-1]),))
    free = starts[:-1].copy()  # the next free row of each list
    for done, file in enumerate(scores.files):
        progress(done, len(scores.files), "files merged")
        lists_N = _assign(merged.parent, scores, file, side, quantizer_LW)
        for positions, block_NW in scores.vectors(file, side):
            lists = lists_N[positions - file.start]
            order = np.argsort(lists, kind="stable")
            here, in_each = np.unique(lists, return_counts=True)
            nth = np.arange(len(lists)) - np.repeat(in_each.cumsum() - in_each, in_each)  # of its list in this block
            target = np.repeat(free[here], in_each) + nth
            vectors[target], places[target] = block_NW[order], positions[order]
            free[here] += in_each
    vectors.flush()
    places.flush()
    _save(merged / STARTS, starts)


def _load(path: Path, dtype: type[Number], num_axes: int) -> NDArray[Number] | None:
    """The array of a file, read as it is used; None if there is no such file, or it is not whole or of another kind."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and array.ndim == num_axes else None


def _new(path: Path, dtype: type[Number], shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[Number]]:
    """An array in a file. Its space on the disk is taken at once: writing to one without would kill the process."""
    array: np.memmap[Any, np.dtype[Number]] = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _save(path: Path, array: NDArray[Any]) -> None:
    with publish(str(path)) as stream:
        np.save(stream, array, allow_pickle=False)
