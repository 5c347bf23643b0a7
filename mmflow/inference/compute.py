"""Results of models over shards of datasets: what is missing is computed in one reading of each shard, and stored."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from mmflow.core.errors import MmflowError
from mmflow.core.progress import Report
from mmflow.core.storage import COPY_BYTES, publish
from mmflow.dataset.format import ShardInfo
from mmflow.dataset.opened import open_dataset
from mmflow.inference.prepare import Looks, Prepared, Rows
from mmflow.inference.result import Columns, Floats, Result, Stored, column, embeddings_of, of_nulls
from mmflow.inference.runner import Done, Job, Model, Pool, Work, run

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch, Predictor
    from mmflow.models.package import LoadedModel

ROW_GROUP = 4096  # rows of a result that are held before they are written
NOT_FINITE = "the model's output is not finite"
KEY, ROW = column("key", pa.string(), "the sample's key"), column("row", pa.int32(), "its row in the shard")
ERROR = column("error", pa.string(), "why the row has no values; null where all went well")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a model about some shards of a split."""

    model: Model
    dataset: str  # URI
    split: str
    results: tuple[Result, ...]


def compute(
    requests: Sequence[Request], store: str, *, batch_size: int, pool: Pool, max_errors: float, progress: Report
) -> Done:
    """Compute what is missing of the requests, all at once on the pool's workers, and store it.

    Rows that fail have their `error`. Raises MmflowError where their share of all rows is above `max_errors`.
    """
    jobs, rows, asked = list[Job](), 0, set[str]()
    for request in requests:
        dataset = open_dataset(request.dataset)
        shards = [shard for shard in dataset.shards(request.split) if shard.samples]
        stored = [Stored(store, request.model.digest, result) for result in request.results]
        lacking = {of.uri(shard): shard.name for of in stored for shard in of.missing(shards)}
        names = {name for uri, name in lacking.items() if uri not in asked}
        missing = tuple(shard for shard in shards if shard.name in names)
        rows += sum(shard.samples for shard in shards)
        asked |= lacking.keys()  # of equal shards, and of datasets that share shards, one is computed
        if missing:
            jobs.append(
                ResultsJob(
                    model=request.model,
                    dataset=request.dataset,
                    split=request.split,
                    shards=missing,
                    fingerprint=dataset.fingerprint,
                    results=request.results,
                    store=store,
                    batch_size=batch_size,
                )
            )
    done = run(jobs, pool, progress)
    check_errors(done.errors, rows, done.first_error, max_errors)
    return done


def check_errors(errors: int, rows: int, first_error: str, max_errors: float) -> None:
    """Raise MmflowError where the share of rows that failed is above `max_errors`."""
    if errors > max_errors * rows:
        raise MmflowError(
            f"{errors:,} of {rows:,} rows failed, the first: {first_error}; more than max_errors={max_errors:g}: run "
            "`mmflow verify` on the dataset, or allow more"
        )


@dataclass(frozen=True, kw_only=True)
class ResultsJob(Job):
    """The missing results of a request."""

    fingerprint: str  # of the dataset
    results: tuple[Result, ...]
    store: str
    batch_size: int

    def start(self, loaded: LoadedModel) -> _Started:
        """Computes what the tasks need once for each model, such as the embeddings of class names."""
        import torch

        from mmflow.inference.predict import Predictor

        predictor = Predictor(loaded, self.batch_size)
        with torch.inference_mode(), predictor.precision():
            return _Started(self, predictor, {result: result.start(predictor) for result in self.results})


@dataclass(frozen=True)
class _Started:
    job: ResultsJob
    predictor: Predictor
    state: Mapping[Result, Any]  # what each task computed when it started

    def open(self, shard: ShardInfo, place: int) -> _ShardOfResults:
        return _ShardOfResults(self, shard, place)


class _ShardOfResults(Work):
    """The missing results of one shard, computed a batch at a time."""

    def __init__(self, started: _Started, shard: ShardInfo, place: int) -> None:
        job, digest = started.job, started.job.model.digest
        self.started, self.shard, self.place = started, shard, place
        stored = {result: Stored(job.store, digest, result) for result in job.results}
        self.missing = {result: of for result, of in stored.items() if not of.has(shard)}
        self.read = _read_before(self.missing, job.store, digest, shard)
        needed = (() if self.read and result.reads else result.changes for result in self.missing)
        self.looks = started.predictor.looks(tuple(sorted({change for changes in needed for change in changes})))
        self.files = [_File(result, started.predictor.loaded) for result in self.missing]
        self.done = Done(rows=shard.samples)

    def pieces(self) -> Iterator[tuple[Rows, Looks]]:
        """The rows, a batch at a time."""
        job = self.started.job
        for first in range(0, self.shard.samples if self.missing else 0, job.batch_size):
            stop = min(first + job.batch_size, self.shard.samples)
            yield Rows(job.dataset, job.fingerprint, job.split, self.place, first, stop), self.looks

    def take(self, rows: Rows, prepared: Prepared) -> None:
        """Compute a batch."""
        import torch

        texts = prepared.texts or prepared
        seen, read = self._batch(rows, prepared, {}), self._batch(rows, texts, {})
        computed = self._batch(rows, *_beside(texts, self.read, rows)) if self.read else seen
        failed = dict[int, str]()
        for file in self.files:
            # So a row has the same values and errors whatever else is computed with it.
            batch = computed if file.result.reads else seen if file.result.changes else read
            values: Columns = {}
            if len(batch.prepared.good):
                with torch.inference_mode(), self.started.predictor.precision():
                    values = file.result.run(batch, self.started.state[file.result])
            failed |= file.add(rows.first, batch.prepared, values)
        first = min(failed, default=0)
        self.done = self.done + Done(
            errors=len(failed),
            first_error=f"{self.shard.name}, row {rows.first + first}: {failed[first]}" if failed else "",
        )

    def _batch(self, rows: Rows, prepared: Prepared, stored: Mapping[str, Floats]) -> Batch:
        from mmflow.inference.predict import Batch

        seed = xxhash.xxh3_64_intdigest(f"{self.shard.checksum} {rows.first}".encode()) >> 1
        return Batch(self.started.predictor, prepared, self.shard.name, rows.first, seed, stored)

    def finish(self) -> Done:
        """Publish the files."""
        for file in self.files:
            file.publish(self.missing[file.result].uri(self.shard, damaged=file.damaged))
        return self.done


class _File:
    """The result of one task for one shard, written to a scratch file as it comes, so that memory is that of a row
    group whatever a shard holds."""

    def __init__(self, result: Result, loaded: LoadedModel) -> None:
        self.result = result
        self.schema = pa.schema([KEY, ROW, *result.fields(loaded), ERROR])
        self.scratch = tempfile.TemporaryFile()  # noqa: SIM115 — closed when the file is published, or with its process
        self.writer = pq.ParquetWriter(self.scratch, self.schema, version="2.6", compression="zstd")
        self.held: list[pa.Table] = []
        self.damaged = False

    def add(self, first: int, prepared: Prepared, values: Columns) -> dict[int, str]:
        """Append a batch; the places of the rows with errors, among them those with values that are not finite."""
        places = np.full(len(prepared.keys), -1)
        places[prepared.good] = np.arange(len(prepared.good))
        wrong = {int(prepared.good[row]) for column in values.values() for row in _not_finite(column)}
        places[list(wrong)] = -1
        rows = pa.array(np.maximum(places, 0), mask=places < 0)  # a null row is taken as nulls
        errors = [NOT_FINITE if place in wrong else error for place, error in enumerate(prepared.errors)]
        columns: dict[str, pa.Array] = {
            "key": pa.array(prepared.keys, pa.string()),
            "row": pa.array(np.arange(first, first + len(prepared.keys)), pa.int32()),
            "error": pa.array(errors, pa.string()),
        }
        for field in self.schema:
            if field.name not in columns:
                taken = pa.nulls(len(places), field.type)
                if field.name in values:
                    taken = values[field.name].cast(field.type).take(rows)
                columns[field.name] = of_nulls(taken)
        self.held.append(pa.table([columns[name] for name in self.schema.names], schema=self.schema))
        if sum(map(len, self.held)) >= ROW_GROUP:
            self._write()
        self.damaged |= prepared.damaged > 0
        return {place: error for place, error in enumerate(errors) if error is not None}

    def _write(self) -> None:
        if self.held:
            self.writer.write_table(pa.concat_tables(self.held).combine_chunks(), row_group_size=ROW_GROUP * 2)
            self.held = []

    def publish(self, uri: str) -> None:
        """The whole file under its name."""
        self._write()
        self.writer.close()
        self.scratch.seek(0)
        with self.scratch, publish(uri) as stream:
            shutil.copyfileobj(self.scratch, stream, COPY_BYTES)


def _not_finite(values: pa.Array) -> NDArray[np.int64]:
    """The rows with a number that is not finite, in a column of numbers or of lists of them, or of lists of lists."""
    rows = np.arange(len(values))
    while isinstance(values, pa.ListArray | pa.FixedSizeListArray):
        rows, values = rows[pc.list_parent_indices(values).to_numpy()], values.flatten()
    if not pa.types.is_floating(values.type):
        return rows[:0]
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float32)  # NaN for null
    return np.unique(rows[~np.isfinite(numbers) & values.is_valid().to_numpy(zero_copy_only=False)])


# --- results that are computed from others ----------------------------------------------------------------------------


def _read_before(missing: Iterable[Result], store: str, digest: str, shard: ShardInfo) -> list[pa.Table]:
    """The stored results that the missing ones can be computed from; none where one of them is missing itself."""
    needed = {result: Stored(store, digest, result) for other in missing for result in other.reads}
    if not all(stored.has(shard) for stored in needed.values()):
        return []
    return [stored.read(shard) for stored in needed.values()]


def _beside(prepared: Prepared, tables: Sequence[pa.Table], rows: Rows) -> tuple[Prepared, dict[str, Floats]]:
    """The batch without the rows that have an error in the stored results, which they take over, and the embeddings
    (G, W) that these have of the others."""
    errors, parts = list(prepared.errors), [table.slice(rows.first, rows.stop - rows.first) for table in tables]
    for part in parts:
        errors = [error or stored for error, stored in zip(errors, part["error"].to_pylist(), strict=True)]
    kept = [number for number, place in enumerate(prepared.good) if errors[place] is None]
    good_G, samples = prepared.good[kept], [prepared.samples[number] for number in kept]
    columns = {
        field.name: embeddings_of(part[field.name].take(pa.array(good_G)))
        for part in parts
        for field in part.schema
        if isinstance(field.type, pa.FixedSizeListType)
    }
    return replace(prepared, errors=errors, good=good_G, samples=samples, pixels={}), columns
