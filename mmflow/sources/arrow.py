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
from mmflow.sources.config import FieldsConfig
from mmflow.sources.records import SPLIT, Found
from mmflow.sources.tables import ROWS_PER_READ, damaged, fields_of_batch
from mmflow.sources.units import Unit

DICTIONARY, INFO, STATE = "dataset_dict.json", "dataset_info.json", "state.json"
# Cut between two batches, a file would read like a shorter one.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
NOT_OF_A_SPLIT = re.compile(r"[^a-z0-9_-]+")


def list_huggingface(unit: Unit) -> Iterator[Unit]:
    """A unit for each Arrow file of the dataset at `unit.uri`, or of each split of a dictionary of them.

    Raises MisuseError where there is none of either.
    """
    splits = _json(unit.uri, DICTIONARY)
    if splits is not None:
        for name in splits.get("splits", []):
            split = NOT_OF_A_SPLIT.sub("-", name.lower()).strip("-_")
            if not SPLIT.fullmatch(split):
                raise MisuseError(
                    f"{unit.uri}: split {name!r} cannot be spelled in letters, digits, - and _; rename it"
                )
            yield from _files(replace(unit, uri=join(unit.uri, name), prefix=unit.label(name), split=split))
        return
    yield from _files(unit)


def read_huggingface(unit: Unit, names: FieldsConfig) -> Iterator[Found]:
    """The records of an Arrow file; `name` counts its rows from 1. One that ends early is one row, source_damaged."""
    label = unit.label(unit.files[0])
    row = 0
    try:
        with open_file(unit.uri, unit.files[0]) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_PER_READ):
                    for what in fields_of_batch(batch.slice(start, ROWS_PER_READ), names):
                        row += 1
                        yield Found(row, f"{label}:{row}", what)
            file.seek(file.size() - len(END_OF_STREAM))
            if file.read() != END_OF_STREAM:
                yield Found(row + 1, f"{label}:{row + 1}", damaged("ends without an end of stream: it was cut"))
    except (pa.ArrowException, OSError) as error:
        yield Found(row + 1, f"{label}:{row + 1}", damaged(f"cannot be read from here on: {error}"))


def _files(unit: Unit) -> Iterator[Unit]:
    state = _json(unit.uri, STATE)
    if state is None:
        raise MisuseError(f"{unit.uri}: no {STATE}, so no dataset was saved here by `save_to_disk`")
    for file in state.get("_data_files", []):
        yield replace(unit, name=unit.label(file["filename"]), files=(file["filename"],))


def _json(uri: str, name: str) -> Any:
    try:
        return json.loads(read_bytes(join(uri, name)))
    except MissingArtifactError:
        return None
    except ValueError as error:
        raise MisuseError(f"{join(uri, name)}: not JSON ({error}); save the dataset again") from error
