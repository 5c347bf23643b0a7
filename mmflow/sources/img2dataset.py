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

from mmflow.core.listing import extension, is_image, open_file, open_stream, walk
from mmflow.sources.config import FieldsConfig
from mmflow.sources.fields import IMAGES, Fields, fields_of
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import Found
from mmflow.sources.sidecars import SIDECARS, read_sidecars
from mmflow.sources.tables import damaged, rows_of_batch
from mmflow.sources.tars import read_samples
from mmflow.sources.units import Unit

ROWS_PER_READ = 64
SUCCESS = "success"
# What it says of an image that it fetched and could not decode or resize; every other failure may pass.
RESIZE_FAILED = "failed_to_resize"


def list_img2dataset(unit: Unit) -> Iterator[Unit]:
    """A unit for each shard below `unit.uri`: its table, with its tar or its images and what stands beside them.

    A killed run leaves tars and folders without a table: these are shards all the same.
    """
    shards: defaultdict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    sidecars: defaultdict[str, list[str]] = defaultdict(list)  # folder → files
    files = walk(unit.uri)
    for file in files:
        if (kind := extension(file.name)) in ("tar", "parquet"):
            shards[file.name.removesuffix(f".{kind}")][kind].append(file.name)
    for file in files:
        folder = file.name.rpartition("/")[0]
        if is_image(file.name):
            shards[folder]["images"].append(file.name)
        elif extension(file.name) in SIDECARS:
            sidecars[folder].append(file.name)
    for shard, kinds in sorted(shards.items()):
        beside = sidecars[shard] if kinds["images"] else []
        names = (*kinds["tar"], *kinds["parquet"], *kinds["images"], *beside)
        yield replace(unit, name=unit.label(shard) if shard else unit.prefix, files=names)


def read_img2dataset(unit: Unit, names: FieldsConfig) -> Iterator[Found]:
    """The records of a shard: those of its tar, the other inputs of its table, then the images that neither lists."""
    tar = next((name for name in unit.files if name.endswith(".tar")), None)
    table = next((name for name in unit.files if name.endswith(".parquet")), None)
    images = {_key(name): name for name in unit.files if is_image(name)}
    seen: set[str] = set()  # keys
    row = -1
    if tar is not None:
        with open_stream(unit.uri, tar) as stream:
            for row, (key, what) in enumerate(read_samples(stream, names)):
                seen.add(key or "")
                yield Found(row, f"{unit.label(tar)}:{key}" if key else unit.label(tar), what)
    if table is not None:
        start = row
        in_tar = frozenset(seen) if tar is not None else None
        for found in _listed(unit, table, names, images, in_tar, seen):
            row = start + found.row
            yield replace(found, row=row)
    beside: defaultdict[str, dict[str, str]] = defaultdict(dict)  # key → extension → file
    for name in unit.files:
        if extension(name) in SIDECARS:
            beside[_key(name)][extension(name)] = name
    for name in filter(is_image, unit.files):
        if (key := _key(name)) in seen:
            continue
        row += 1
        verdict: Fields | Rejected
        try:
            verdict = replace(read_sidecars(unit, beside[key], names), key=key, images=[name])
        except Rejected as rejected:
            verdict = rejected
        yield Found(row, unit.label(name), verdict)


def _listed(
    unit: Unit,
    table: str,
    names: FieldsConfig,
    images: Mapping[str, str],
    in_tar: frozenset[str] | None,
    seen: set[str],
) -> Iterator[Found]:
    """The inputs that a shard's table lists, but for those whose keys are `in_tar`; adds the keys to `seen`."""
    label = unit.label(table)
    number = 0
    try:
        with open_file(unit.uri, table) as raw:
            for batch in pq.ParquetFile(raw).iter_batches(ROWS_PER_READ, use_threads=False):
                for record in rows_of_batch(batch):
                    number += 1
                    if isinstance(record, Rejected):
                        yield Found(number, f"{label}:{number}", record)
                        continue
                    key = str(record.get("key"))
                    if in_tar is not None and key in in_tar and record.get("status") == SUCCESS:
                        continue
                    seen.add(key)
                    what = _record(record, names, images.get(key), in_tar=in_tar is not None)
                    yield Found(number, f"{label}:{number}", what)
    except (pa.ArrowException, OSError) as error:
        yield Found(number + 1, label, damaged(f"the list of inputs ends early: {error}"))


def _key(name: str) -> str:
    """The name of a file up to its first dot."""
    return name.rpartition("/")[2].partition(".")[0]


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
