"""The embeddings of scores in a file on this node that all its processes map: memory does not grow with their number,
and one process reads them from storage for all."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmflow.core.errors import MmflowError
from mmflow.inference.result import vectors, vectors_of
from mmflow.inference.scores import COLUMNS, Scores, Side

PLACE = ("key", "shard", "row")  # columns of the scores

# Shapes: N rows, C rows of a block, W width of the embeddings.


@dataclass(frozen=True)
class Mapped:
    """The rows of scores that have an embedding, in their order."""

    rows: pa.Table  # (N): key, dataset, shard, row
    blocks: Sequence[NDArray[np.float16]]  # (C, W) each, N rows in all
    held: IO[bytes]  # whose lock keeps the file while it is in use

    @property
    def width(self) -> int:
        """Of the embeddings."""
        return int(self.blocks[0].shape[1])


def mapped(scores: Scores, side: Side) -> Mapped:
    """The embeddings of one side, from this node's file, which is written first if there is none.

    Raises as `Scores.vectors`, and MmflowError if the disk is full.
    """
    folder = Path(tempfile.gettempdir()) / f"mmflow-scores-{os.getuid()}"
    path = folder / f"{scores.fingerprint[:32]}-{side}.arrow"
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make_room(folder)
            _write(path, scores, side)
        held = open(path, "rb")  # noqa: SIM115 — for as long as the result
        fcntl.flock(held, fcntl.LOCK_SH)
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    blocks = [
        batch["embedding"].flatten().to_numpy().reshape(batch.num_rows, -1)
        for batch in table.select(["embedding"]).to_batches()
    ]
    return Mapped(table.drop_columns("embedding"), blocks, held)


def _make_room(folder: Path) -> None:
    """Delete what no process has in use."""
    for path in folder.glob("*.arrow"):
        with open(path, "rb") as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _write(path: Path, scores: Scores, side: Side) -> None:
    column, width = COLUMNS[side], scores.width(side)
    kinds: dict[str, Any] = {"key": pa.string(), "dataset": pa.string(), "shard": pa.string(), "row": pa.int32()}
    schema = pa.schema({**kinds, "embedding": vectors(width, "float16")})
    part = path.with_name("part")  # also of a process that was killed
    try:
        with open(part, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
            for file in scores.files:
                for batch in scores.batches(file, [*PLACE, column]):
                    values = batch[column].flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
                    rows = np.flatnonzero(~np.isnan(values[:, 0]))
                    arrays = {name: batch[name].cast(schema.field(name).type).take(rows) for name in PLACE}
                    arrays["dataset"] = pa.array([file.dataset] * len(rows), pa.string())
                    arrays["embedding"] = vectors_of(values[rows], "float16")
                    if len(rows):
                        writer.write_batch(pa.record_batch(arrays, schema))
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MmflowError(
            f"{path.parent}: {error.strerror}; {scores.uri} is searched from a copy on each node, so set TMPDIR to a "
            f"folder with room for {scores.rows * width * 2:,} bytes"
        ) from error
    part.rename(path)
