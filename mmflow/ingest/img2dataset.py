"""What img2dataset wrote: images in tars, folders or Parquet, and beside them a table with a row for every input.

The table says what became of each input, so that those it could not fetch are accounted for as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmflow.ingest.config import FieldsConfig
from mmflow.ingest.fields import IMAGES, Fields, fields_of
from mmflow.ingest.listing import extension, is_image, open_file, open_stream, walk
from mmflow.ingest.reasons import Reason, Rejected
from mmflow.ingest.records import Found
from mmflow.ingest.tables import damaged, rows_of_batch
from mmflow.ingest.tars import read_samples
from mmflow.ingest.units import Unit

ROWS_PER_READ = 64
SUCCESS = "success"
# What it says of an image that it fetched and could not decode or resize; every other failure may pass.
RESIZE_FAILED = "failed_to_resize"


def list_img2dataset(unit: Unit) -> Iterator[Unit]:
    """A unit for each shard below `unit.uri`: its table, with its tar or its images, or a tar that lost its table."""
    shards: defaultdict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    files = walk(unit.uri)
    for file in files:
        if (kind := extension(file.name)) in ("tar", "parquet"):
            shards[file.name.removesuffix(f".{kind}")][kind].append(file.name)
    for file in files:
        folder = file.name.rpartition("/")[0]
        if is_image(file.name) and folder in shards:
            shards[folder]["images"].append(file.name)
    for shard, kinds in sorted(shards.items()):
        names = (*kinds["tar"], *kinds["parquet"], *kinds["images"])
        yield replace(unit, name=unit.label(shard), files=names)


def read_img2dataset(unit: Unit, names: FieldsConfig) -> Iterator[Found]:
    """The records of a shard: its images, then the inputs without one."""
    tar = next((name for name in unit.files if name.endswith(".tar")), None)
    table = next((name for name in unit.files if name.endswith(".parquet")), None)
    images = {name.rpartition("/")[2].partition(".")[0]: name for name in unit.files if is_image(name)}
    seen: set[str] = set()
    row = -1
    if tar is not None:
        with open_stream(unit.uri, tar) as stream:
            for row, (key, what) in enumerate(read_samples(stream, names)):
                seen.add(key or "")
                yield Found(row, f"{unit.label(tar)}:{key}" if key else unit.label(tar), what)
    if table is None:
        return
    label = unit.label(table)
    try:
        with open_file(unit.uri, table) as raw:
            number = 0
            for batch in pq.ParquetFile(raw).iter_batches(ROWS_PER_READ, use_threads=False):
                for record in rows_of_batch(batch):
                    row, number = row + 1, number + 1
                    if isinstance(record, Rejected):
                        yield Found(row, f"{label}:{number}", record)
                        continue
                    key = str(record.get("key"))
                    if key in seen and record.get("status") == SUCCESS:
                        continue
                    what = _record(record, names, images.get(key), in_tar=tar is not None)
                    yield Found(row, f"{label}:{number}", what)
    except (pa.ArrowException, OSError) as error:
        yield Found(row + 1, label, damaged(f"the list of inputs ends early: {error}"))


def _record(record: Mapping[str, Any], names: FieldsConfig, image: str | None, *, in_tar: bool) -> Fields | Rejected:
    status = record.get("status", SUCCESS)
    if status != SUCCESS:
        reason = Reason.image_unreadable if status == RESIZE_FAILED else Reason.fetch_failed
        return Rejected(reason, f"{record.get('url')}: {record.get('error_message') or status}")
    if in_tar:
        return Rejected(Reason.image_missing, f"{record.get('key')}: listed, but not in the tar")
    try:
        fields = fields_of(record, names, with_image=False)
    except Rejected as rejected:
        return rejected
    if image is not None:
        return replace(fields, images=[image])
    body = next((record[name] for name in IMAGES if isinstance(record.get(name), bytes)), None)
    metadata = {name: value for name, value in fields.metadata.items() if not isinstance(record.get(name), bytes)}
    bodies = [body] if body is not None else []
    return replace(fields, bodies=bodies, metadata=metadata, no_image=f"{record.get('key')}: listed, but not there")
