"""Records listed a line each: JSONL and CSV. A bad line is a rejected record and takes no neighbour along."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import IO, Any, NoReturn

from mmflow.core.listing import open_stream
from mmflow.sources.config import FieldsConfig
from mmflow.sources.fields import Fields, fields_of
from mmflow.sources.reasons import Rejected
from mmflow.sources.records import Found, malformed
from mmflow.sources.units import Unit

MAX_LINE_BYTES = 64 << 20
# Longest record of a CSV file. An opening quote that nobody closed would otherwise swallow the rest of the file.
MAX_CSV_LINES = 1000
DELIMITERS = ",\t;|"


def read_jsonl(unit: Unit, names: FieldsConfig) -> Iterator[Found]:
    """The records of a JSONL file; blank lines are no records."""
    with open_stream(unit.uri, unit.files[0]) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if isinstance(line, bytes) and not line.strip():
                continue
            what: Fields | Rejected
            try:
                if isinstance(line, int):
                    raise malformed(f"a line of {line} bytes, at most {MAX_LINE_BYTES} are read")
                what = parse_record(line, names)
            except Rejected as rejected:
                what = rejected
            yield Found(number, f"{unit.label(unit.files[0])}:{number}", what)


def parse_record(line: bytes, names: FieldsConfig) -> Fields:
    """The fields of a record from its line of JSON. Raises Rejected with record_malformed."""
    return fields_of(parse_object(line), names)


def parse_object(text: bytes) -> Mapping[str, Any]:
    """A JSON object. Raises Rejected with record_malformed."""
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise malformed(f"not text: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise malformed(f"a JSON object is needed, not {type(value).__name__}")
    return value


def read_csv(unit: Unit, names: FieldsConfig) -> Iterator[Found]:
    """The records of a CSV or TSV file, whose first line names the columns. `row` counts lines, as editors do."""
    label = unit.label(unit.files[0])
    with open_stream(unit.uri, unit.files[0]) as stream:
        lines = _Lines(stream)
        columns: list[str] | None = None
        delimiter = ","
        while (first := lines.peek()) is not None:
            if not first.strip():
                lines.drop(1)
                continue
            number = lines.number
            if columns is None:
                delimiter = "\t" if unit.files[0].lower().endswith(".tsv") else max(DELIMITERS, key=first.count)
            what: Fields | Rejected | None
            try:
                cells = _csv_record(lines, delimiter, None if columns is None else len(columns))
                if columns is None:
                    columns = [cell.strip() for cell in cells]
                    continue
                what = fields_of(dict(zip(columns, cells, strict=True)), names)
            except Rejected as rejected:
                what = rejected
                if columns is None:
                    # Without the names of its columns, no line of the file means anything.
                    columns = []
            yield Found(number, f"{label}:{number}", what)


class _Lines:
    """Lines of a text file that can be given back. Bytes that are no UTF-8 become surrogates, which no row may hold."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = _lines(stream)
        self._waiting: deque[str] = deque()
        self.number = 1  # of the line that `peek` shows

    def at(self, place: int) -> str | None:
        """The line so many behind the one that `peek` shows."""
        while len(self._waiting) <= place:
            line = next(self._lines, None)
            if line is None:
                return None
            if isinstance(line, int):
                line = b'"'  # too long to be kept: a line that no CSV can have
            encoding = "utf-8-sig" if self.number == 1 and not self._waiting else "utf-8"
            self._waiting.append(line.decode(encoding, "surrogateescape"))
        return self._waiting[place]

    def peek(self) -> str | None:
        """The next line, None at the end."""
        return self.at(0)

    def drop(self, count: int) -> None:
        """Go on behind so many lines."""
        for _ in range(count):
            self._waiting.popleft()
        self.number += count


def _csv_record(lines: _Lines, delimiter: str, width: int | None) -> list[str]:
    """The cells of the next record, of as many lines as its quotes ask for.

    Raises Rejected, one line further, where it cannot be right: the lines behind a quote that nobody closed, or that
    was closed in another record, are records of their own.
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
        if width is not None and len(cells) != width:
            raise malformed(f"{len(cells)} cells, but {width} columns have names")
    except csv.Error as error:
        lines.drop(1)
        raise malformed(f"not CSV: {error}") from error
    except Rejected:
        lines.drop(1)
        raise
    lines.drop(taken)
    return cells


def _lines(stream: IO[bytes]) -> Iterator[bytes | int]:
    """The lines; for one that is too long, its length in bytes."""
    while line := stream.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
            length += len(line)
        yield length


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
