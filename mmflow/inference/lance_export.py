"""Scores as a Lance dataset beside their Parquet files, for search by vector and for random access."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.parquet as pq

from mmflow.core.errors import MisuseError
from mmflow.core.storage import filesystem, join
from mmflow.inference.result import column
from mmflow.inference.scores import Scores

FOLDER = "scores.lance"


def check_lance() -> None:
    """Raise MisuseError if Lance is not installed."""
    if find_spec("lance") is None:
        raise MisuseError("--to lance needs Lance, which is not installed: pip install 'mmflow[lance]'")


def write_lance(scores: Scores) -> str:
    """Write the rows of all files, with the column `dataset` and with nulls for vectors that are missing; the URI.

    What is there already stays: scores never change. Lance publishes its version last, so a killed process leaves
    none.
    """
    import lance

    uri = join(scores.uri, FOLDER)
    try:
        lance.dataset(uri)
    except ValueError:  # there is none
        system, path = filesystem(scores.files[0].uri)
        fields = [column("dataset", pa.string(), "its dataset"), *pq.read_schema(path, filesystem=system)]
        schema = pa.schema(fields)
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, _batches(scores, schema)), uri)
    return uri


def _batches(scores: Scores, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for file in scores.files:
        for batch in scores.batches(file, schema.names[1:]):
            arrays = [pa.array([file.dataset] * batch.num_rows, pa.string()), *map(_with_nulls, batch.columns)]
            yield pa.record_batch(arrays, schema)


def _with_nulls(array: pa.Array) -> pa.Array:
    """The column with null vectors for vectors of nulls: Lance leaves these out of a search."""
    if not isinstance(array, pa.FixedSizeListArray):
        return array
    values = array.flatten()
    missing = values.is_null().to_numpy(zero_copy_only=False).reshape(len(array), -1)[:, 0]
    return pa.FixedSizeListArray.from_arrays(values, type=array.type, mask=pa.array(missing))
