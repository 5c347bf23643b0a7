"""Parquet tables: a unit is a range of row groups, read a few rows at a time, however large a row group is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmflow.core.listing import open_file
from mmflow.sources.config import FieldsConfig, SourceConfig
from mmflow.sources.fields import IMAGES, fields_of
from mmflow.sources.reasons import Rejected, damaged, malformed
from mmflow.sources.records import Fields, Kind, Record, Unit, attempt

BYTES_PER_UNIT = 128 << 20  # uncompressed: seconds of work, and the most that a dying task loses
# Rows decoded at once. Their images, some MB each, are Python objects for a moment.
ROWS_PER_READ = 64
NOT_READABLE = (pa.ArrowException, OSError)


def split_parquet(unit: Unit) -> list[Unit]:
    """The unit of a whole file, cut into ranges of its row groups."""
    try:
        with open_file(unit.uri, unit.files[0]) as file:
            metadata = pq.ParquetFile(file).metadata
    except NOT_READABLE:
        return [unit]  # read_parquet says what is wrong
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    ranges: list[tuple[int, int]] = []
    start = num_bytes = 0
    for number, group in enumerate(groups):
        if number > start and num_bytes + group.total_byte_size > BYTES_PER_UNIT:
            ranges.append((start, number))
            start, num_bytes = number, 0
        num_bytes += group.total_byte_size
    ranges.append((start, len(groups)))
    return [
        replace(
            unit,
            name=unit.name if len(ranges) == 1 else f"{unit.name}#{first}-{stop}",
            row_groups=(first, stop),
            records=sum(group.num_rows for group in groups[first:stop]),
        )
        for first, stop in ranges
    ]


def holds_bodies(unit: Unit, names: FieldsConfig) -> bool:
    """Whether each record of a unit holds its image's bytes, by the file's footer alone."""
    try:
        with open_file(unit.uri, unit.files[0]) as file:
            parquet = pq.ParquetFile(file)
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except NOT_READABLE:
        return False
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
    return all(counts is not None and counts.has_null_count and counts.null_count == 0 for counts in statistics)


def read_parquet(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The records of a range of row groups, named by the rows of the file from 1.

    The unreadable rest of a row group is one row with source_damaged; the next row groups are read all the same.
    """
    label = unit.label(unit.files[0])
    with open_file(unit.uri, unit.files[0]) as raw:
        try:
            file = pq.ParquetFile(raw)
        except NOT_READABLE as error:
            yield Record(label, damaged(f"not Parquet: {error}"))
            return
        first, stop = unit.row_groups or (0, file.metadata.num_row_groups)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        for group in range(first, stop):
            row = start = sum(sizes[:group])
            try:
                for batch in file.iter_batches(ROWS_PER_READ, row_groups=[group], use_threads=False):
                    for content in fields_of_batch(batch, source.fields):
                        row += 1
                        yield Record(f"{label}:{row}", content)
            except NOT_READABLE as error:
                lost = start + sizes[group] - row
                detail = f"row group {group}: {lost} of its {sizes[group]} rows cannot be read: {error}"
                yield Record(f"{label}:{row + 1}", damaged(detail))


def fields_of_batch(batch: pa.RecordBatch, names: FieldsConfig) -> Iterator[Fields | Rejected]:
    """The fields of each row; a row with strings that are not UTF-8 is rejected alone."""
    for values in rows_of_batch(batch):
        yield values if isinstance(values, Rejected) else attempt(fields_of, values, names)


def rows_of_batch(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Rejected]:
    """The rows as Python values, and a rejection for each row with strings that are not UTF-8."""
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


KIND = Kind(
    read=read_parquet,
    extensions=("parquet",),
    units_of_file=split_parquet,
    may_name_urls=True,
    holds_bodies=holds_bodies,
)
