"""Hugging Face datasets as `save_to_disk` leaves them: Arrow streams, read without the `datasets` package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mmflow.core.errors import MissingArtifactError, MisuseError
from mmflow.core.listing import open_file
from mmflow.core.storage import join, read_bytes
from mmflow.sources.config import SourceConfig
from mmflow.sources.parquet import NOT_READABLE, ROWS_PER_READ, fields_of_batch
from mmflow.sources.reasons import damaged
from mmflow.sources.records import SPLIT, Kind, Record, Unit

DICTIONARY, INFO, STATE = "dataset_dict.json", "dataset_info.json", "state.json"
# A file cut between two batches lacks only this; otherwise it reads like a shorter file.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
NOT_OF_A_SPLIT = re.compile(r"[^a-z0-9_-]+")


def list_huggingface(unit: Unit, source: SourceConfig) -> Iterator[Unit]:
    """A unit for each Arrow file of the dataset at `unit.uri`, or of each split if it is a dictionary of datasets.

    Raises MisuseError where there is neither.
    """
    splits = _json(unit.uri, DICTIONARY)
    if splits is None:
        yield from _files(unit)
        return
    for name in splits.get("splits", []):
        split = NOT_OF_A_SPLIT.sub("-", name.lower()).strip("-_")
        if not SPLIT.fullmatch(split):
            raise MisuseError(f"{unit.uri}: split {name!r} has no letter or digit of a-z, 0-9 to keep; rename it")
        yield from _files(replace(unit, uri=join(unit.uri, name), prefix=unit.label(name), split=split))


def read_huggingface(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The records of an Arrow file, named by its rows from 1. The missing rest of a cut file is one damaged row."""
    label = unit.label(unit.files[0])
    row = 0
    try:
        with open_file(unit.uri, unit.files[0]) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_PER_READ):
                    for content in fields_of_batch(batch.slice(start, ROWS_PER_READ), source.fields):
                        row += 1
                        yield Record(f"{label}:{row}", content)
            file.seek(file.size() - len(END_OF_STREAM))
            if file.read() != END_OF_STREAM:
                yield Record(f"{label}:{row + 1}", damaged("ends without an end of stream: it was cut"))
    except NOT_READABLE as error:
        yield Record(f"{label}:{row + 1}", damaged(f"cannot be read from here on: {error}"))


def _files(unit: Unit) -> Iterator[Unit]:
    state = _json(unit.uri, STATE)
    if state is None:
        raise MisuseError(f"{unit.uri}: no {STATE}, so `save_to_disk` did not save a dataset here")
    for file in state.get("_data_files", []):
        yield replace(unit, name=unit.label(file["filename"]), files=(file["filename"],))


def _json(uri: str, name: str) -> Any:
    try:
        return json.loads(read_bytes(join(uri, name)))
    except MissingArtifactError:
        return None
    except ValueError as error:
        raise MisuseError(f"{join(uri, name)}: not JSON ({error}); save the dataset again") from error


KIND = Kind(
    read=read_huggingface,
    recognises=lambda files: not {DICTIONARY, INFO, STATE}.isdisjoint(files),
    units_of_folder=list_huggingface,
)
