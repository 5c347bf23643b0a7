"""JSONL and CSV: one record per line. A bad line is one rejected record, and the lines around it are read."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import IO

from mmflow.core.listing import open_stream
from mmflow.sources.config import FieldsConfig, SourceConfig
from mmflow.sources.fields import fields_of, parse_object
from mmflow.sources.reasons import Rejected, malformed
from mmflow.sources.records import Fields, Kind, Record, Unit, attempt

MAX_LINE_BYTES = 64 << 20
# Longest record of a CSV file. Otherwise a quote that is never closed would swallow the rest of the file.
MAX_CSV_LINES = 1000
DELIMITERS = ",\t;|"


def read_jsonl(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The records of a JSONL file; blank lines are not records."""
    label = unit.label(unit.files[0])
    with open_stream(unit.uri, unit.files[0]) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if isinstance(line, bytes) and not line.strip():
                continue
            yield Record(f"{label}:{number}", attempt(_fields_of_line, line, source.fields))


def _fields_of_line(line: bytes | int, names: FieldsConfig) -> Fields:
    if isinstance(line, int):
        raise malformed(f"a line of {line} bytes, at most {MAX_LINE_BYTES} are read")
    return fields_of(parse_object(line), names)


def read_csv(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The records of a CSV or TSV file with column names in its first line, named by their first lines."""
    name = unit.files[0]
    with open_stream(unit.uri, name) as stream:
        lines = _Lines(stream)
        columns: list[str] | None = None
        delimiter = ","
        while (line := lines.at(0)) is not None:
            if not line.strip():
                lines.drop(1)
                continue
            number = lines.number
            if columns is None:
                delimiter = "\t" if name.lower().endswith(".tsv") else max(DELIMITERS, key=line.count)
            content: Fields | Rejected
            try:
                cells = _csv_record(lines, delimiter, None if columns is None else len(columns))
                if columns is None:
                    columns = [cell.strip() for cell in cells]
                    continue
                content = fields_of(dict(zip(columns, cells, strict=True)), source.fields)
            except Rejected as rejected:
                content = rejected
                # Without column names, every line after a bad first one is rejected too.
                columns = columns or []
            yield Record(f"{unit.label(name)}:{number}", content)


class _Lines:
    """The lines of a text file, with a look ahead. Bytes that are not UTF-8 become surrogates: no row may hold them."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = _lines(stream)
        self._ahead: deque[str] = deque()
        self.number = 1  # of the line `at(0)`

    def at(self, place: int) -> str | None:
        """The line `place` lines ahead; None after the end."""
        while len(self._ahead) <= place:
            line = next(self._lines, None)
            if line is None:
                return None
            if isinstance(line, int):
                line = b'"'  # in place of a line too long to keep: a line that is not CSV
            encoding = "utf-8-sig" if self.number == 1 and not self._ahead else "utf-8"
            self._ahead.append(line.decode(encoding, "surrogateescape"))
        return self._ahead[place]

    def drop(self, count: int) -> None:
        """Go on after `count` lines."""
        for _ in range(count):
            self._ahead.popleft()
        self.number += count


def _csv_record(lines: _Lines, delimiter: str, width: int | None) -> list[str]:
    """The cells of the next record, over as many lines as its quotes span.

    Raises Rejected if it cannot be right, and then skips one line only: after a quote that was never closed, or was
    closed in another record, the next lines are records of their own.
    """
    taken = 0

    def feed() -> Iterator[str]:
        nonlocal taken
        while taken < MAX_CSV_LINES and (line := lines.at(taken)) is not None:
            taken += 1
            yield line

    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        cells = next(csv.reader(feed(), delimiter=delimiter, strict=True))
    except csv.Error as error:
        lines.drop(1)
        raise malformed(f"not CSV: {error}") from error
    if width is not None and len(cells) != width:
        lines.drop(1)
        raise malformed(f"{len(cells)} cells, but {width} columns have names")
    lines.drop(taken)
    return cells


def _lines(stream: IO[bytes]) -> Iterator[bytes | int]:
    """The lines; in place of a line that is too long, its length in bytes."""
    while line := stream.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
            length += len(line)
        yield length


JSONL = Kind(read=read_jsonl, extensions=("jsonl", "ndjson"), record_per_line=True, may_name_urls=True)
CSV = Kind(read=read_csv, extensions=("csv", "tsv"), record_per_line=True, may_name_urls=True)
