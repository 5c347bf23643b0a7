"""A result: what one model says of every row of one shard, for one task. It is kept under a name that its inputs
decide, so it is computed once, whoever asks, and a dataset that grew by a shard costs one shard.

    <results>/<model digest>/<task identity>/<shard checksum>.parquet     key, row, the task's columns, `error`

A shard that was damaged when it was read has `<shard checksum>.damaged.parquet` instead, with errors for the rows that
are not what was committed. It is computed again when somebody asks next: the shard may have been restored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmflow.core.artifacts import content_hash
from mmflow.core.config import Config
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.core.storage import exists, filesystem, join
from mmflow.dataset.format import ShardInfo, list_folder

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch, Predictor
    from mmflow.models.package import LoadedModel

Floats = NDArray[np.float32]
DAMAGED = ".damaged"
Columns = Mapping[str, pa.Array]  # name → a value for each good row of a batch
Gives = frozenset[str]  # what a model can be asked for: `ModelConfig.gives`


class Result(Config, ABC):
    """What is asked of a model about every row; the fields are its settings."""

    task: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when the same settings come to mean other values
    needs: ClassVar[tuple[Gives, ...]]  # what the model must give: everything in one of these
    remedy: ClassVar[str]  # what a model with it has, for the error

    @property
    def changes(self) -> tuple[str, ...]:
        """The changes of pictures that it looks at, "" for none; () if it reads texts alone."""
        return ("",)

    @property
    def reads(self) -> tuple[Result, ...]:
        """Results that it is computed from, where they are stored already."""
        return ()

    def __hash__(self) -> int:
        """Of the settings, which may hold lists."""
        return hash(content_hash(self.settings))

    @abstractmethod
    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """Its columns, each with a `description`."""

    def start(self, predictor: Predictor) -> Any:
        """What is computed once for each model, and handed to `run`."""
        return None

    @abstractmethod
    def run(self, batch: Batch, started: Any) -> Columns:
        """The values of the good rows of a batch. In inference mode."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the values beside model and shard."""
        return {"task": self.task, "version": self.version, **self.identity()}

    def folder(self, store: str, digest: str) -> str:
        """Where the results of a model are kept."""
        return join(store, digest[:32], f"{self.task}-{content_hash(self.settings)[:16]}")


def column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    """A column with its description, which readers of Parquet find in the schema."""
    return pa.field(name, kind, metadata={"description": description})


def vectors(width: int, dtype: str) -> pa.DataType:
    """The type of embeddings: fixed-size lists of float16 or float32."""
    return pa.list_(pa.float16() if dtype == "float16" else pa.float32(), width)


def vectors_of(embeddings_BW: Floats, dtype: str, missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Embeddings as a column, vectors of nulls where `missing`."""
    width = embeddings_BW.shape[1]
    flat = pa.array(embeddings_BW.astype(dtype).ravel(), mask=None if missing is None else np.repeat(missing, width))
    return pa.FixedSizeListArray.from_arrays(flat, width)


def of_nulls(column: pa.Array) -> pa.Array:
    """The column with vectors of nulls for null vectors, which pyarrow 25 writes to Parquet and cannot read
    (apache/arrow#35692). Columns of another type are left as they are."""
    if not isinstance(column, pa.FixedSizeListArray) or not column.null_count:
        return column
    width = column.type.list_size
    values = column.values.slice(column.offset * width, len(column) * width)
    valid = np.repeat(column.is_valid().to_numpy(zero_copy_only=False), width)
    return pa.FixedSizeListArray.from_arrays(pc.if_else(valid, values, pa.scalar(None, values.type)), width)


def lists_of(values: pa.Array, lengths: Sequence[int]) -> pa.ListArray:
    """The values, one after another, as a list of the given length for each row."""
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)


def embeddings_of(column: pa.ChunkedArray | pa.Array) -> Floats:
    """(rows, W) fp32 of a column of vectors; NaN where it is one of nulls."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: Floats = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)
    return values.astype(np.float32)


class Stored:
    """The results of one task by one model, as they stand in the store."""

    def __init__(self, store: str, digest: str, result: Result) -> None:
        self.folder = result.folder(store, digest)

    @cached_property
    def _names(self) -> dict[str, int]:
        parent, _, name = self.folder.rpartition("/")
        return list_folder(parent, name)

    def missing(self, shards: Iterable[ShardInfo]) -> list[ShardInfo]:
        """The shards whose results are not there, or damaged."""
        return [shard for shard in shards if f"{shard.checksum}.parquet" not in self._names]

    def has(self, shard: ShardInfo) -> bool:
        """Whether a shard's result is there and whole, now."""
        return exists(self.uri(shard))

    def uri(self, shard: ShardInfo, *, damaged: bool = False) -> str:
        """The file of a shard's result."""
        return join(self.folder, f"{shard.checksum}{DAMAGED if damaged else ''}.parquet")

    def read(self, shard: ShardInfo, columns: Sequence[str] | None = None) -> pa.Table:
        """The shard's rows in order, of a damaged shard too. Raises as `read_table`."""
        whole = self.uri(shard)
        return read_table(whole if exists(whole) else self.uri(shard, damaged=True), shard, columns)


def read_table(uri: str, shard: ShardInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """A result's rows in order. Raises MissingArtifactError, or CorruptArtifactError naming the file."""
    system, path = filesystem(uri)
    try:
        with system.open_input_file(path) as stream:  # of a few columns, the others are not read
            table = pq.ParquetFile(stream).read(columns=columns and list(columns), use_threads=False)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error
    except (pa.ArrowException, OSError, KeyError) as error:
        raise CorruptArtifactError(f"{uri}: not a result ({error}); delete it and run again") from error
    if table.num_rows != shard.samples:
        raise CorruptArtifactError(f"{uri}: {table.num_rows} rows for {shard.samples} samples; delete it and run again")
    return table
