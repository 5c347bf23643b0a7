"""Records in Parquet: a unit is a range of row groups, read a few rows at a time, whatever a row group weighs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmflow.core.listing import open_file
from mmflow.sources.config import FieldsConfig
from mmflow.sources.fields import IMAGES, Fields, fields_of
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import Found, malformed
from mmflow.sources.units import Unit

BYTES_PER_UNIT = 128 << 20  # uncompressed: some seconds of work, and a bound on what a task that dies has lost
# Rows decoded at once. Images of some MB each are in such tables too, and are Python objects for a moment.
ROWS_PER_READ = 64


def split_parquet(unit: Unit) -> list[Unit]:
    """The unit of a whole file, as one for each range of its row groups."""
    try:
        with open_file(unit.uri, unit.files[0]) as file:
            metadata = pq.ParquetFile(file).metadata
    except (pa.ArrowException, OSError):
        return [unit]  # its reader says what is wrong
    sizes = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    ranges: list[tuple[int, int]] = []
    start = num_bytes = 0
    for number, group in enumerate(sizes):
        if number > start and num_bytes + group.total_byte_size > BYTES_PER_UNIT:
            ranges.append((start, number))
            start, num_bytes = number, 0
        num_bytes += group.total_byte_size
    ranges.append((start, len(sizes)))
    return [
        replace(
            unit,
            name=unit.name if len(ranges) == 1 else f"{unit.name}#{first}-{stop}",
            row_groups=(first, stop),
            records=sum(group.num_rows for group in sizes[first:stop]),
        )
        for first, stop in ranges
    ]


def holds_bodies(unit: Unit, names: FieldsConfig) -> bool:
    """Whether each record of a unit has its image's bytes, by what the file says of its columns: nothing is read."""
    try:
        with open_file(unit.uri, unit.files[0]) as file:
            parquet = pq.ParquetFile(file)
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError):
        return False  # its reader says what is wrong
    image = next((name for name in ((names.image,) if names.image else IMAGES) if name in schema.names), None)
    if image is None:
        return False
    kind, path = schema.field(image).type, image
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # Hugging Face's Image
        kind, path = kind.field("bytes").type, f"{image}.bytes"
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return False
    groups = map(metadata.row_group, range(*(unit.row_groups or (0, metadata.num_row_groups))))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == path]
    return all(each is not None and each.has_null_count and each.null_count == 0 for each in statistics)


def read_parquet(unit: Unit, names: FieldsConfig) -> Iterator[Found]:
    """The records of a range of row groups; `name` counts the file's rows from 1.

    A row group that cannot be read to its end is one row with source_damaged, and those behind it are read all the
    same.
    """
    label = unit.label(unit.files[0])
    with open_file(unit.uri, unit.files[0]) as raw:
        try:
            file = pq.ParquetFile(raw)
        except (pa.ArrowException, OSError) as error:
            yield Found(0, label, damaged(f"not Parquet: {error}"))
            return
        first, stop = unit.row_groups or (0, file.metadata.num_row_groups)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        row, number = 0, sum(sizes[:first])
        for group in range(first, stop):
            read = 0
            try:
                for batch in file.iter_batches(ROWS_PER_READ, row_groups=[group], use_threads=False):
                    for what in fields_of_batch(batch, names):
                        read += 1
                        yield Found(row + read, f"{label}:{number + read}", what)
            except (pa.ArrowException, OSError) as error:
                lost = sizes[group] - read
                what = damaged(f"row group {group}: {lost} of its {sizes[group]} rows cannot be read: {error}")
                yield Found(row + read + 1, f"{label}:{number + read + 1}", what)
            row, number = row + sizes[group], number + sizes[group]


def fields_of_batch(batch: pa.RecordBatch, names: FieldsConfig) -> Iterator[Fields | Rejected]:
    """What each row says; a row whose strings are no UTF-8 is rejected alone."""
    for values in rows_of_batch(batch):
        try:
            yield values if isinstance(values, Rejected) else fields_of(values, names)
        except Rejected as rejected:
            yield rejected


def rows_of_batch(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Rejected]:
    """The rows as Python values, and a verdict in place of one whose strings are no UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield malformed(f"not text: {error.reason}")


def damaged(detail: str) -> Rejected:
    """A verdict of source_damaged."""
    return Rejected(Reason.source_damaged, " ".join(detail.split())[:300])
