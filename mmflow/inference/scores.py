"""Committed scores opened by their URI: the model, the datasets, and the embeddings in the files, a block at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmflow.core.artifacts import MANIFEST, read_artifact
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.storage import exists, filesystem, join, read_json

KIND = "scores"
LATEST = ("score", "latest.json")  # in a workspace: {"uri"} of its latest scores
BLOCK_ROWS = 4096  # rows held at a time: 4 MB of 512 float16 each

# Shapes: N rows of a block, W width of the embeddings.

Side = Literal["pictures", "captions"]
COLUMNS: dict[Side, str] = {"pictures": "image_embedding", "captions": "caption_embedding"}
Block = tuple[NDArray[np.int64], NDArray[np.floating]]
"""(N,) positions among all rows of the scores, and (N, W) their embeddings."""


@dataclass(frozen=True, kw_only=True)
class ScoreFile:
    """One Parquet file: the results of one shard."""

    uri: str
    dataset: str  # its name in the scores
    rows: int
    sha256: str
    start: int  # the position of its first row among all rows of the scores


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Committed scores. Rows are numbered through all files, in the manifest's order."""

    uri: str
    fingerprint: str
    package: str  # URI of the model's package
    digest: str
    name: str | None  # the model's name and version in the registry
    version: int | None
    datasets: Mapping[str, str]  # name → URI
    files: tuple[ScoreFile, ...]

    @property
    def rows(self) -> int:
        """The number of rows of all files."""
        return sum(file.rows for file in self.files)

    def width(self, side: Side) -> int:
        """The width of the embeddings of one side. Raises MisuseError if there are none; otherwise as `vectors`."""
        for file in self.files:
            for _, vectors in self.vectors(file, side):
                return int(vectors.shape[1])
        raise MisuseError(f"{self.uri}: no row has an embedding of its {side[:-1]}; score the dataset with task embed")

    def vectors(self, file: ScoreFile, side: Side) -> Iterator[Block]:
        """The embeddings of a file's pictures or captions, without the rows that have none.

        Raises MisuseError if the scores are without embeddings, as those of a captioner, MissingArtifactError if the
        file is gone, CorruptArtifactError if it is not what was committed.
        """
        position = file.start
        for batch in self.batches(file, [COLUMNS[side]]):
            values = batch.column(0).flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, -1)
            rows = np.flatnonzero(~np.isnan(values[:, 0]))
            if len(rows):
                yield position + rows, values[rows]
            position += batch.num_rows

    def batches(self, file: ScoreFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of a file, `BLOCK_ROWS` at a time. Raises as `vectors`."""
        with _opened(file) as opened:
            for column in columns:
                if column not in opened.schema_arrow.names:
                    raise MisuseError(f"{self.uri}: no column {column}; score the dataset with task embed")
            yield from opened.iter_batches(batch_size=BLOCK_ROWS, columns=list(columns))

    def read(self, file: ScoreFile, columns: Sequence[str], rows: Sequence[int]) -> list[dict[str, Any]]:
        """Some columns of some rows of a file, in the order of `rows`. Raises as `vectors`."""
        with _opened(file) as opened:
            table = opened.read(columns=list(columns))
        values: list[dict[str, Any]] = table.take(rows).to_pylist()
        return values


def file_uri(uri: str, dataset: str, shard: str, *, several: bool) -> str:
    """The file of a shard of a dataset; in a folder of the dataset's where the scores are of several."""
    return join(uri, "scores", *([f"dataset={dataset}"] if several else []), f"{shard}.parquet")


def open_scores(uri: str) -> Scores:
    """The scores at `uri`, or the latest of the workspace there.

    Raises MissingArtifactError if there are none, MisuseError for another kind of artifact, CorruptArtifactError for a
    manifest that does not name its model, datasets and files.
    """
    latest = join(uri, *LATEST)
    try:
        if not exists(join(uri, MANIFEST)) and exists(latest):
            uri = str(read_json(latest)["uri"])
        manifest = read_artifact(uri, KIND).manifest
        model = manifest["model"]
        return Scores(
            uri=uri,
            fingerprint=manifest["fingerprint"],
            package=model["package"],
            digest=model["digest"],
            name=model["name"],
            version=model["version"],
            datasets={dataset["name"]: dataset["uri"] for dataset in manifest["datasets"]},
            files=_files(uri, manifest),
        )
    except (KeyError, TypeError) as error:
        raise CorruptArtifactError(
            f"{uri}: its manifest is not that of scores ({type(error).__name__}: {error}); score the dataset again"
        ) from error


def _files(uri: str, manifest: Mapping[str, Any]) -> tuple[ScoreFile, ...]:
    entries = manifest["files"]
    starts = accumulate((entry["rows"] for entry in entries), initial=0)
    several = len(manifest["datasets"]) > 1
    files = []
    for entry, start in zip(entries, starts, strict=False):  # the last start is the end
        files.append(
            ScoreFile(
                uri=file_uri(uri, entry["dataset"], entry["name"], several=several),
                dataset=entry["dataset"],
                rows=entry["rows"],
                sha256=entry["sha256"],
                start=start,
            )
        )
    return tuple(files)


@contextlib.contextmanager
def _opened(file: ScoreFile) -> Iterator[pq.ParquetFile]:
    system, path = filesystem(file.uri)
    try:
        with system.open_input_file(path) as stream:
            opened = pq.ParquetFile(stream)
            if opened.metadata.num_rows != file.rows:
                raise CorruptArtifactError(
                    f"{file.uri}: {opened.metadata.num_rows} rows instead of {file.rows}; score the dataset again"
                )
            yield opened
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{file.uri}: no such file; score the dataset again") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptArtifactError(f"{file.uri}: cannot be read ({error}); score the dataset again") from error
