"""Sources read in process, as lists of plain rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmflow.sources.config import SourceConfig
from mmflow.sources.records import RECORDS
from mmflow.sources.sources import list_units, read_unit


def read(uri: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """The rows of a source in the order of their places, which must differ; `metadata` parsed."""
    return read_all([SourceConfig(uri=str(uri), **settings)])


def read_all(sources: Sequence[SourceConfig]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for unit in list_units(sources):
        for table in read_unit(unit, sources[unit.source]):
            assert table.schema.equals(RECORDS)
            rows += table.to_pylist()
    assert len({row["place"] for row in rows}) == len(rows)
    for row in rows:
        row["metadata"] = json.loads(row["metadata"]) if row["metadata"] is not None else None
    return sorted(rows, key=lambda row: row["place"])


def texts(row: dict[str, Any]) -> list[str]:
    return [caption["text"] for caption in row["captions"]]


def reasons(rows: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    assert len({row["source"] for row in rows}) == len(rows)
    return {row["source"]: row["reason"] for row in rows}
