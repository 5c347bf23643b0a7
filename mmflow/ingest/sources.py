"""Sources to records: one Ray Dataset of metadata rows, whatever the corpus looks like on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import pyarrow as pa
import ray.data

from mmflow.artifacts import exists
from mmflow.errors import MisuseError
from mmflow.ingest.config import SourceConfig
from mmflow.ingest.records import read_jsonl


def read_records(sources: Sequence[SourceConfig]) -> ray.data.Dataset:
    """A Ray Dataset of `RECORDS`, one row for each record of each source, good or not.

    Raises MisuseError where a source is named twice or is not there.
    """
    names = source_names([source.uri for source in sources])
    for source in sources:
        if not exists(source.uri):
            raise MisuseError(f"{source.uri}: no such file; it is named in `sources`")
    items = [
        {"number": number, "name": name, "uri": source.uri}
        for number, (name, source) in enumerate(zip(names, sources, strict=True))
    ]
    files = ray.data.from_items(items, override_num_blocks=len(items))
    # A file a task: line numbers need the lines before them.
    return files.map_batches(_read_batch, batch_size=1, batch_format="pyarrow")


def source_names(uris: Sequence[str]) -> list[str]:
    """Each URI's file name, with as many of its folders as tell it from the others: never a path of this machine.

    Raises MisuseError where a URI is repeated.
    """
    if len(set(uris)) < len(uris):
        repeated = next(uri for uri in uris if list(uris).count(uri) > 1)
        raise MisuseError(f"{repeated}: named twice in `sources`; every record would be repeated")
    parts = [PurePosixPath(uri).parts for uri in uris]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _read_batch(batch: pa.Table) -> Iterator[pa.Table]:
    for source in batch.to_pylist():
        yield from read_jsonl(source["uri"], source["name"], source["number"])
