"""Exact search: the rows of scores whose picture or caption is most similar to a text or a picture.

All embeddings are compared, a block of rows at a time, so memory does not grow with the rows. `search_index` is for
more rows than this reads in seconds.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmflow.cleaning.config import ImageConfig
from mmflow.cleaning.images import check_bounds
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError, MmflowError
from mmflow.core.progress import Report
from mmflow.core.storage import filesystem, read_bytes
from mmflow.dataset.opened import open_dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.imaging.header import FORMATS, JPEGS, probe, without_notes
from mmflow.inference.predict import Predictor
from mmflow.inference.scores import Block, Scores, Side
from mmflow.learning.nearest import nearest_in_tiles
from mmflow.models.package import LoadedModel, load_package, read_config, read_package
from mmflow.sources.reasons import Rejected

MAX_THREADS = 8  # that read files; each holds a few blocks
MAX_PICTURE_BYTES = 256 << 20  # of a picture that is searched for
BOUNDS = ImageConfig(min_side=1)  # of its pixels, as for pictures of a dataset

# Shapes: N rows of a block, K kept rows, W width of the embeddings.

Floats = NDArray[np.float32]


class Best(NamedTuple):
    """The most similar rows, best first; of equal rows, the first comes first."""

    scores_K: Floats  # cosine
    positions_K: NDArray[np.int64]


NONE = Best(np.zeros(0, np.float32), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Query:
    """What is searched for: a text, or the picture in the file that it names."""

    text: str
    picture: Sample | None = None


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A row that was found: its place in the ranking, and where its sample is."""

    rank: int  # from 1
    score: float
    dataset: str
    split: str
    shard: str
    row: int
    key: str


# --- what is searched for ---------------------------------------------------------------------------------------------


def read_query(text: str) -> Query:
    """A text, or a picture if the text is the path or URI of a file or ends like the name of a picture's.

    Raises MisuseError if there is nothing in it or the file is no picture within bounds, MissingArtifactError if there
    is no such file.
    """
    if not text.strip():
        raise MisuseError("the query is empty; give a text, or the path of a picture")
    suffix = os.path.splitext(text)[1].lower()
    is_name = Image.registered_extensions().get(suffix) in FORMATS
    if not (is_name or "://" in text or os.path.isfile(text)):
        return Query(text)
    system, path = filesystem(text)
    info = system.get_file_info(path)
    if not info.is_file:
        raise MissingArtifactError(f"{text}: no such file")
    if info.size > MAX_PICTURE_BYTES:
        raise MisuseError(f"{text}: {info.size:,} bytes, at most {MAX_PICTURE_BYTES:,} are read as a picture")
    body = read_bytes(text)
    try:
        header = probe(body)
        check_bounds(header, BOUNDS)
    except Rejected as error:
        raise MisuseError(f"{text}: no picture to search for: {error.detail}") from error
    extension = "jpg" if header.format in JPEGS else header.format.lower()
    return Query(text, Sample(text, without_notes(body), extension, (), {}))


def embed_query(scores: Scores, query: Query, width: int) -> Floats:
    """(W,) of unit length, by the model that made the scores; cut to their width.

    Raises MissingArtifactError if its package is gone, CorruptArtifactError if it is another model now, MisuseError if
    it gives no embeddings or if the picture is damaged.
    """
    try:
        package = read_package(scores.package)
    except MissingArtifactError as error:
        raise MissingArtifactError(f"{scores.uri}: the package of its model is gone: {error}; restore it") from error
    if package.digest != scores.digest:
        raise CorruptArtifactError(
            f"{scores.package}: digest {package.digest[:16]}, but {scores.uri} was made by {scores.digest[:16]}; "
            "restore that package or score the dataset again"
        )
    if "embeddings" not in read_config(package).gives:
        raise MisuseError(f"{scores.uri}: its model gives no embeddings to search with")
    loaded = load_package(package)
    try:
        embedding_W = _embed(loaded, query)[:width]
    except CorruptArtifactError as error:
        raise MisuseError(f"{query.text}: the picture is damaged: it cannot be decoded to its end") from error
    unit_W: Floats = embedding_W / np.linalg.norm(embedding_W)
    return unit_W


def _embed(loaded: LoadedModel, query: Query) -> Floats:
    predictor = Predictor(loaded, 1)
    rows_1W = predictor.embed_pictures([query.picture]) if query.picture else predictor.embed_texts([query.text])
    embedding_W: Floats = rows_1W[0]
    return embedding_W


# --- the nearest rows -------------------------------------------------------------------------------------------------


def search(scores: Scores, side: Side, query_W: Floats, top: int, progress: Report) -> Best:
    """The `top` rows whose pictures or captions are most similar to the query; fewer if there are fewer.

    Raises as `Scores.vectors`.
    """
    best = NONE
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    try:
        found = pool.map(lambda file: best_rows(scores.vectors(file, side), query_W, top), scores.files)
        for done, best_of_file in enumerate(found, 1):
            best = merge([best, best_of_file], top)
            progress(done, len(scores.files), "files")
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the files that are not begun
    return best


def best_rows(blocks: Iterable[Block], query_W: Floats, top: int) -> Best:
    """The `top` rows of all blocks that are most similar to the query. A row without a finite score is left out.

    Raises CorruptArtifactError for embeddings of another width than the query's.
    """
    seen = [NONE.positions_K]

    def vectors() -> Iterator[NDArray[np.floating]]:
        for positions_N, vectors_NW in blocks:
            if vectors_NW.shape[1] != len(query_W):
                raise CorruptArtifactError(
                    f"embeddings {vectors_NW.shape[1]} wide in the scores, but the query's is {len(query_W)} wide; "
                    "score the dataset again"
                )
            seen.append(positions_N)
            yield vectors_NW

    device = "cuda" if torch.cuda.is_available() else "cpu"
    places_1K, scores_1K = nearest_in_tiles(query_W[None], vectors(), top, device=device)
    finite = np.isfinite(scores_1K[0])
    return merge([Best(scores_1K[0, finite], np.concatenate(seen)[places_1K[0, finite]])], top)


def merge(parts: Sequence[Best], top: int) -> Best:
    """The `top` best of several."""
    scores, positions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((positions, -scores))[:top]
    return Best(scores[order], positions[order])


# --- what was found ---------------------------------------------------------------------------------------------------


def hits_of(scores: Scores, best: Best) -> list[Hit]:
    """The rows as the scores name them, best first."""
    starts = [file.start for file in scores.files]
    in_file: dict[int, list[int]] = {}
    for position in best.positions_K.tolist():
        in_file.setdefault(bisect_right(starts, position) - 1, []).append(position)
    named: dict[int, dict[str, Any]] = {}  # position → its row in the scores
    for number, positions in in_file.items():
        file = scores.files[number]
        rows = scores.read(file, ["key", "split", "shard", "row"], [position - file.start for position in positions])
        for position, row in zip(positions, rows, strict=True):
            named[position] = row | {"dataset": file.dataset}
    ranked = zip(best.scores_K.tolist(), best.positions_K.tolist(), strict=True)
    return [
        Hit(rank=rank, score=round(score, 6), **named[position]) for rank, (score, position) in enumerate(ranked, 1)
    ]


def read_samples(scores: Scores, hits: Sequence[Hit]) -> list[Sample | MmflowError]:
    """The sample of each hit, read by its index alone; in its place the error of one that cannot be read."""
    readers: dict[tuple[str, str], Reader | MmflowError] = {}
    samples: list[Sample | MmflowError] = []
    for hit in hits:
        source = (hit.dataset, hit.split)
        try:
            if source not in readers:
                readers[source] = Reader(open_dataset(scores.datasets[hit.dataset]), hit.split, frames=False)
            reader = readers[source]
            samples.append(reader if isinstance(reader, MmflowError) else _sample(reader, hit))
        except MmflowError as error:
            readers.setdefault(source, error)
            samples.append(error)
    return samples


def _sample(reader: Reader, hit: Hit) -> Sample:
    shard = next((place for place, shard in enumerate(reader.shards) if shard.name == hit.shard), None)
    if shard is not None and hit.row < reader.shards[shard].samples:
        sample = reader.read(shard, hit.row)
        if sample.key == hit.key:
            return sample
    raise CorruptArtifactError(
        f"{reader.dataset.uri}: {hit.key} is no longer row {hit.row} of shard {hit.shard}; score the dataset again"
    )
