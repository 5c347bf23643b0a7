"""A recipe's sources: the table of their kinds, the units they are cut into, and one Ray Dataset of all records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mmflow.core import listing
from mmflow.core.errors import MisuseError
from mmflow.core.listing import extension
from mmflow.core.storage import join
from mmflow.sources import folder, html, huggingface, img2dataset, jsonl_csv, parquet, webdataset
from mmflow.sources.config import SourceConfig, SourceKind
from mmflow.sources.records import (
    CHUNK,
    SOURCE_BITS,
    UNIT_BITS,
    UNREADABLE,
    Fields,
    Kind,
    Record,
    Unit,
    tables_of,
    unreadable,
)

if TYPE_CHECKING:
    import ray.data

# In the order in which `auto` asks them whether they recognise a folder.
KINDS: Mapping[SourceKind, Kind] = {
    "huggingface": huggingface.KIND,
    "img2dataset": img2dataset.KIND,
    "webdataset": webdataset.KIND,
    "folder": folder.KIND,
    "jsonl": jsonl_csv.JSONL,
    "csv": jsonl_csv.CSV,
    "parquet": parquet.KIND,
    "html": html.KIND,
}
KIND_OF_EXTENSION = {ending: name for name, kind in KINDS.items() for ending in kind.extensions}

HASH_THREADS = 8
# Listing is over before readers start, and a reader mostly waits. With less than a CPU, Ray Data does not fuse reading
# with the next step, which would tie all records of a unit to one CPU.
READER_CPUS = 0.25
# Three such tasks share two CPUs with a reader: each is idle for a fifth of its time, until Ray Data's driver hands it
# the next chunk. A twentieth faster than two tasks, measured on two cores; a pool of actors with queued chunks was not.
# A task reaches half a GiB where images are large.
PREPARE_CPUS = 0.58


def list_units(sources: Sequence[SourceConfig]) -> list[Unit]:
    """The parts that the sources are read in, with a fingerprint of each one's content.

    Raises MisuseError where a source is not there, holds nothing of its kind, or is named twice.
    """
    if len(sources) >> SOURCE_BITS:
        raise MisuseError(f"{len(sources)} sources, at most {(1 << SOURCE_BITS) - 1} are possible; use globs")
    source_names([source.uri for source in sources])
    units: list[Unit] = []
    owner: dict[str, int] = {}  # file → source
    names: set[str] = set()
    for number, source in enumerate(sources):
        new = _units_of_source(source, names)
        if len(new) >> UNIT_BITS:
            raise MisuseError(f"{source.uri}: {len(new)} units, at most {(1 << UNIT_BITS) - 1} are possible; split it")
        for unit in new:
            for file in unit.files:
                if owner.setdefault(f"{unit.uri}/{file}", number) != number:
                    raise MisuseError(f"{unit.uri}: {file} is named twice in `sources`; its records would be repeated")
        names.update(unit.name for unit in new)
        units += [replace(unit, source=number, number=place) for place, unit in enumerate(new)]
    unread = list(dict.fromkeys((unit.uri, unit.files) for unit in units if not unit.fingerprint))
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing and reading both release Python's lock
        hashes = dict(zip(unread, pool.map(lambda key: listing.fingerprint_and_lines(*key), unread), strict=True))
    return [unit if unit.fingerprint else _with_fingerprint(unit, *hashes[unit.uri, unit.files]) for unit in units]


def read_unit(unit: Unit, source: SourceConfig) -> Iterator[pa.Table]:
    """The records of a unit as tables of `RECORDS`, one per chunk: the same at every reading."""
    return tables_of(_records(unit, source), source, unit)


def read_chunks(units: Sequence[Unit], sources: Sequence[SourceConfig]) -> ray.data.Dataset:
    """A Ray Dataset of the units' records, good or not; each block is a row of `CHUNK`.

    Ray Data joins small blocks up to a size limit: the next task would then decode 10⁵ images or none. So a chunk is
    one row, and the limit is one byte, so that no block has two rows. This also holds for the next steps if their
    tables have one row. Cutting blocks instead (`repartition`) takes a CPU per task, which leaves one of two to decode.
    """
    import ray.data

    items = [{"unit": json.dumps(asdict(unit))} for unit in units]
    chunks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _read_batch,  # type: ignore[arg-type] # Ray types functions without keyword arguments only
        fn_kwargs={"sources": list(sources)},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=READER_CPUS,
    )
    chunks.context.target_max_block_size = 1  # byte
    return chunks


def source_names(uris: Sequence[str]) -> list[str]:
    """Each URI's file name, with as many folders as make it differ from those before; never a path of this machine.

    Keys are made from names, so a source added at the end changes no earlier name. Raises MisuseError where a URI is
    repeated.
    """
    names: dict[str, str] = {}
    for uri in uris:
        if uri in names.values():
            raise MisuseError(f"{uri}: named twice in `sources`; every record would be repeated")
        parts = PurePosixPath(uri).parts
        depth = 1
        while "/".join(parts[-depth:]) in names and depth < len(parts):
            depth += 1
        names["/".join(parts[-depth:])] = uri
    return list(names)


def _units_of_source(source: SourceConfig, taken: set[str]) -> list[Unit]:
    """The units, named from the directory that the URI's fixed part ends in, or from further up if names are taken."""
    places = listing.find(source.uri)
    base = places[0].base
    while True:
        units = [unit for place in places for unit in _units_of_place(place, base, source)]
        if not units:
            raise MisuseError(f"{source.uri}: nothing to read there; see `kind`")
        above = listing.parent(base)
        if above == base or not any(unit.name in taken for unit in units):
            return units
        base = above


def _units_of_place(place: listing.Place, base: str, source: SourceConfig) -> Iterator[Unit]:
    """The units of a file or a directory that the source's URI names."""
    if not place.is_directory:
        directory = listing.parent(place.uri)
        file = listing.name_below(place.uri, directory)
        yield from _units_of_file(_kind_of_file(place.uri, file, source.kind), directory, base, file)
        return
    name = source.kind if source.kind != "auto" else _kind_of_folder(place.uri)
    kind = KINDS[name]
    if kind.units_of_folder is not None:
        prefix = listing.name_below(place.uri, base)
        yield from kind.units_of_folder(Unit(kind=name, name=prefix, uri=place.uri, prefix=prefix), source)
        return
    for entry in listing.walk(place.uri):
        if extension(entry.name) in kind.extensions:
            yield from _units_of_file(name, place.uri, base, entry.name)


def _units_of_file(name: SourceKind, directory: str, base: str, file: str) -> Iterator[Unit]:
    """The units of a file below a directory: relative to the file's own directory, as what a list names is."""
    below, _, file = file.rpartition("/")
    prefix = "/".join(filter(None, (listing.name_below(directory, base), below)))
    uri = join(directory, below) if below else directory
    unit = Unit(kind=name, name="/".join(filter(None, (prefix, file))), uri=uri, prefix=prefix, files=(file,))
    yield from KINDS[name].units_of_file(unit)


def _kind_of_file(uri: str, file: str, kind: SourceKind) -> SourceKind:
    name = kind if kind != "auto" else KIND_OF_EXTENSION.get(extension(file))
    if name is None or not KINDS[name].extensions:
        what = "a folder is needed" if name else "its extension is not of a known kind"
        known = ", ".join(sorted(set(KIND_OF_EXTENSION.values())))
        raise MisuseError(f"{uri}: a file, and {what}; set `kind` to one of {known}")
    return name


def _kind_of_folder(uri: str) -> SourceKind:
    """The kind of a directory. Raises MisuseError where it could be several."""
    files = [file.name for file in listing.walk(uri)]
    for name, kind in KINDS.items():
        if kind.recognises(files):
            return name
    names = {KIND_OF_EXTENSION[extension(file)] for file in files if extension(file) in KIND_OF_EXTENSION}
    if len(names) > 1:
        raise MisuseError(f"{uri}: holds {', '.join(sorted(names))}; set `kind` to the one to read")
    return names.pop() if names else "folder"


def _records(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """The unit's records, in its split; a file that is gone or closed to us is one row."""
    try:
        for record in KINDS[unit.kind].read(unit, source):
            content = record.content
            if unit.split is not None and isinstance(content, Fields) and content.split is None:
                record = replace(record, content=replace(content, split=unit.split))
            yield record
    except UNREADABLE as error:
        yield Record(unit.label(unit.files[0]), unreadable(error))


def _with_fingerprint(unit: Unit, digest: str, lines: int) -> Unit:
    """The unit with its fingerprint; the number of lines tells how many records to expect of a list."""
    if unit.row_groups is not None:
        digest = f"{digest}-{unit.row_groups[0]}-{unit.row_groups[1]}"
    expected = lines if unit.records is None and KINDS[unit.kind].record_per_line else unit.records
    return replace(unit, fingerprint=digest, records=expected)


def _read_batch(batch: pa.Table, sources: Sequence[SourceConfig]) -> Iterator[pa.Table]:
    for text in batch["unit"].to_pylist():
        fields: dict[str, Any] = json.loads(text)
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        unit = Unit(**fields)
        for rows in read_unit(unit, sources[unit.source]):
            records = rows.to_struct_array().combine_chunks()
            yield pa.table([pa.LargeListArray.from_arrays([0, len(records)], records)], schema=CHUNK)
