"""What img2dataset wrote: images in tars, folders or Parquet, and beside them a table with one row per input.

The table says what became of each input, so that inputs it could not fetch are accounted for as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from mmflow.core.listing import extension, is_image, open_file, open_stream, walk
from mmflow.sources.config import FieldsConfig, SourceConfig
from mmflow.sources.fields import IMAGES, SIDECARS, fields_of, read_sidecars
from mmflow.sources.parquet import NOT_READABLE, ROWS_PER_READ, rows_of_batch
from mmflow.sources.reasons import Reason, Rejected, damaged
from mmflow.sources.records import Fields, Kind, Record, Unit, attempt
from mmflow.sources.webdataset import read_samples

SHARDS = ("tar", "parquet")
STATS = "_stats.json"  # beside each shard
SUCCESS = "success"
# The status of an image that was fetched and could not be decoded or resized; every other failure may be temporary.
RESIZE_FAILED = "failed_to_resize"


def list_img2dataset(unit: Unit, source: SourceConfig) -> Iterator[Unit]:
    """A unit for each shard below `unit.uri`: its table, with its tar, or its images and the files beside them.

    A killed run leaves tars and folders without a table: these are shards all the same.
    """
    shards: defaultdict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    sidecars: defaultdict[str, list[str]] = defaultdict(list)  # folder → files
    for file in walk(unit.uri):
        folder, kind = file.name.rpartition("/")[0], extension(file.name)
        if kind in SHARDS:
            shards[file.name.removesuffix(f".{kind}")][kind].append(file.name)
        elif is_image(file.name):
            shards[folder]["images"].append(file.name)
        elif kind in SIDECARS:
            sidecars[folder].append(file.name)
    for shard, files in sorted(shards.items()):
        beside = sidecars[shard] if files["images"] else []
        names = (*files["tar"], *files["parquet"], *files["images"], *beside)
        yield replace(unit, name=unit.label(shard) if shard else unit.prefix, files=names)


def read_img2dataset(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The records of a shard: those of its tar, the other inputs of its table, then images that neither lists."""
    tar = next((name for name in unit.files if name.endswith(".tar")), None)
    table = next((name for name in unit.files if name.endswith(".parquet")), None)
    images = {_key(name): name for name in unit.files if is_image(name)}
    seen: set[str] = set()  # keys
    if tar is not None:
        with open_stream(unit.uri, tar) as stream:
            for key, content in read_samples(stream, source.fields):
                seen.add(key or "")
                yield Record(f"{unit.label(tar)}:{key}" if key else unit.label(tar), content)
    if table is not None:
        in_tar = frozenset(seen) if tar is not None else None
        yield from _read_table(unit, table, source.fields, images, in_tar, seen)
    sidecars: defaultdict[str, dict[str, str]] = defaultdict(dict)  # key → extension → file
    for name in unit.files:
        if extension(name) in SIDECARS:
            sidecars[_key(name)][extension(name)] = name
    for name in filter(is_image, unit.files):
        if (key := _key(name)) not in seen:
            unlisted = attempt(read_sidecars, unit, sidecars[key], source.fields, key=key, images=[name])
            yield Record(unit.label(name), unlisted)


def _read_table(
    unit: Unit,
    table: str,
    names: FieldsConfig,
    images: Mapping[str, str],
    in_tar: frozenset[str] | None,
    seen: set[str],
) -> Iterator[Record]:
    """The inputs of a shard's table, without those that succeeded and are `in_tar`; adds their keys to `seen`."""
    label = unit.label(table)
    number = 0
    try:
        with open_file(unit.uri, table) as raw:
            for batch in pq.ParquetFile(raw).iter_batches(ROWS_PER_READ, use_threads=False):
                for values in rows_of_batch(batch):
                    number += 1
                    if isinstance(values, Rejected):
                        yield Record(f"{label}:{number}", values)
                        continue
                    key = str(values.get("key"))
                    if in_tar is not None and key in in_tar and values.get("status") == SUCCESS:
                        continue
                    seen.add(key)
                    content = attempt(_fields_of_input, values, names, images.get(key), has_tar=in_tar is not None)
                    yield Record(f"{label}:{number}", content)
    except NOT_READABLE as error:
        yield Record(label, damaged(f"the list of inputs ends early: {error}"))


def _fields_of_input(values: Mapping[str, Any], names: FieldsConfig, image: str | None, *, has_tar: bool) -> Fields:
    status = values.get("status", SUCCESS)
    if status != SUCCESS:
        reason = Reason.image_unreadable if status == RESIZE_FAILED else Reason.fetch_failed
        raise Rejected(reason, f"{values.get('url')}: {values.get('error_message') or status}")
    if has_tar:
        raise Rejected(Reason.image_missing, f"{values.get('key')}: in the table, but not in the tar")
    fields = fields_of(values, names, with_image=False)
    if image is not None:
        return replace(fields, images=[image])
    bodies = [values[name] for name in IMAGES if isinstance(values.get(name), bytes)][:1]
    metadata = {name: value for name, value in fields.metadata.items() if not isinstance(values.get(name), bytes)}
    no_image = f"{values.get('key')}: in the table, but there is no image"
    return replace(fields, bodies=bodies, metadata=metadata, no_image=no_image)


def _key(name: str) -> str:
    """The name of a file up to its first dot."""
    return name.rpartition("/")[2].partition(".")[0]


def recognises_img2dataset(files: Sequence[str]) -> bool:
    """Whether there are shards, and statistics of shards."""
    return any(extension(name) in SHARDS for name in files) and any(name.endswith(STATS) for name in files)


KIND = Kind(read=read_img2dataset, recognises=recognises_img2dataset, units_of_folder=list_img2dataset)
