"""A unit: the part of a source that one task reads, such as a tar, a range of row groups, some images of a folder."""

from __future__ import annotations

from dataclasses import dataclass

from mmflow.sources.config import SourceKind


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one task reads of a source.

    `uri` is the directory that `files` are named in, and that image paths count from; `prefix` is its name without a
    path of this machine, and `name` the unit's. `fingerprint` stands for the content, wherever it lies. `records` is
    about their number, where the source tells it before it is read.
    """

    source: int
    number: int
    kind: SourceKind
    name: str
    uri: str
    prefix: str = ""
    files: tuple[str, ...] = ()
    fingerprint: str = ""
    records: int | None = None
    row_groups: tuple[int, int] | None = None  # of a Parquet file: from, to
    split: str | None = None  # that of every record which names none itself

    def label(self, file: str) -> str:
        """What a file of the unit is called where people read it."""
        return f"{self.prefix}/{file}" if self.prefix else file
