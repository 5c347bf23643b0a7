"""Sources to records: what a recipe names, cut into units, and one Ray Dataset of all their records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mmflow.core import listing
from mmflow.core.errors import MisuseError
from mmflow.core.storage import join
from mmflow.sources.arrow import list_huggingface, read_huggingface
from mmflow.sources.config import SourceConfig, SourceKind
from mmflow.sources.fields import Fields
from mmflow.sources.folders import list_folder, read_folder
from mmflow.sources.img2dataset import list_img2dataset, read_img2dataset
from mmflow.sources.lists import read_csv, read_jsonl
from mmflow.sources.pages import list_pages, read_pages
from mmflow.sources.records import (
    CHUNK,
    SOURCE_BITS,
    UNIT_BITS,
    UNREADABLE,
    Found,
    tables_of,
    unreadable,
)
from mmflow.sources.tables import read_parquet, split_parquet
from mmflow.sources.tars import read_webdataset
from mmflow.sources.units import Unit

if TYPE_CHECKING:
    import ray.data

__all__ = ["Unit", "list_units", "read_chunks", "read_unit", "source_names"]

# Endings of files, and what lies in such a file.
KINDS: dict[str, SourceKind] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "tsv": "csv",
    "parquet": "parquet",
    "tar": "webdataset",
    "html": "html",
    "htm": "html",
    "xhtml": "html",
}
LISTS: tuple[SourceKind, ...] = ("jsonl", "csv", "parquet", "webdataset")  # a file of these is read by itself
FOLDERS: tuple[SourceKind, ...] = ("folder", "img2dataset", "huggingface")  # these are directories
HUGGINGFACE = ("dataset_dict.json", "dataset_info.json", "state.json")
STATS = "_stats.json"  # img2dataset's, beside each shard
HASH_THREADS = 8
# Listing is over before these begin, and a reader mostly waits: a quarter of a CPU keeps Ray Data from making one task
# of reading and what comes next, which would tie all records of a unit to one CPU.
READER_CPUS = 0.25
# Three such tasks share two CPUs with a reader: each stands idle for a fifth of its time, until Ray Data's driver hands
# it the next chunk. A twentieth faster than two, measured on two cores; a pool of actors with chunks waiting was not. A
# task reaches half a GiB where pictures are large.
PREPARE_CPUS = 0.58


def list_units(sources: Sequence[SourceConfig]) -> list[Unit]:
    """The parts that the sources are read in, with a fingerprint of each one's content.

    Raises MisuseError where a source is not there, holds nothing of its kind, or is named twice.
    """
    if len(sources) >> SOURCE_BITS:
        raise MisuseError(f"{len(sources)} sources, at most {(1 << SOURCE_BITS) - 1} can be told apart; use globs")
    source_names([source.uri for source in sources])
    units: list[Unit] = []
    owner: dict[str, int] = {}  # file → source
    labels: set[str] = set()
    for number, source in enumerate(sources):
        found = _units_of_source(source, labels)
        if len(found) >> UNIT_BITS:
            raise MisuseError(f"{source.uri}: {len(found)} units, at most {(1 << UNIT_BITS) - 1} can be told apart")
        for unit in found:
            for file in unit.files:
                if owner.setdefault(f"{unit.uri}/{file}", number) != number:
                    raise MisuseError(f"{unit.uri}: {file} is named twice in `sources`; its records would be repeated")
        labels.update(unit.name for unit in found)
        units += [replace(unit, source=number, number=place) for place, unit in enumerate(found)]
    wanted = list(dict.fromkeys((unit.uri, unit.files) for unit in units if not unit.fingerprint))
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing and reading both leave Python's lock alone
        files = dict(zip(wanted, pool.map(lambda key: listing.fingerprint_and_lines(*key), wanted), strict=True))
    return [unit if unit.fingerprint else _with_fingerprint(unit, *files[unit.uri, unit.files]) for unit in units]


def read_unit(unit: Unit, source: SourceConfig) -> Iterator[pa.Table]:
    """The records of a unit as tables of `RECORDS`, a table a chunk: the same at every reading."""
    return tables_of(_guarded(unit, source), source, unit.source, unit.number, unit.uri)


def read_chunks(units: Sequence[Unit], sources: Sequence[SourceConfig]) -> ray.data.Dataset:
    """A Ray Dataset of the units' records, good or not; each block is a row of `CHUNK`.

    Ray Data joins small blocks up to a bound: a task behind this would then decode 10⁵ images or none. So a chunk is a
    row, and the bound is such that no block has two; that also holds for what follows, whose tables should be of a row.
    A step that cuts blocks (`repartition`) takes a CPU each for its tasks, which leaves one of two to decode.
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
    """Each URI's file name, with as many of its folders as tell it from those before: never a path of this machine.

    What is added behind changes no name that was there: keys are made of them. Raises MisuseError where a URI is
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
    """The units, named from the directory that the URI's fixed part ends in, or one further up if names are taken."""
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
    if not place.is_directory:
        folder = listing.parent(place.uri)
        name = listing.name_below(place.uri, folder)
        kind = source.kind if source.kind != "auto" else KINDS.get(listing.extension(name))
        if kind is None or kind in FOLDERS:
            what = "a folder is needed" if kind else "its ending tells no kind"
            raise MisuseError(
                f"{place.uri}: a file, and {what}; set `kind` to one of {', '.join(sorted(set(KINDS.values())))}"
            )
        yield from _units_of_files(kind, folder, listing.name_below(folder, base), [name])
        return
    kind = source.kind if source.kind != "auto" else _kind_of_folder(place.uri)
    whole = _unit(kind, place.uri, listing.name_below(place.uri, base), ())
    if kind == "folder":
        yield from list_folder(whole, source.frames)
    elif kind == "img2dataset":
        yield from list_img2dataset(whole)
    elif kind == "huggingface":
        yield from list_huggingface(whole)
    elif kind == "html":
        yield from list_pages(whole)
    else:
        files = [file.name for file in listing.walk(place.uri) if KINDS.get(listing.extension(file.name)) == kind]
        yield from _units_of_files(kind, place.uri, whole.prefix, files)


def _units_of_files(kind: SourceKind, uri: str, prefix: str, files: Iterable[str]) -> Iterator[Unit]:
    """A unit a file, named in its own directory: what a list names is relative to the list."""
    for file in files:
        folder, _, name = file.rpartition("/")
        unit = _unit(kind, join(uri, folder) if folder else uri, "/".join(filter(None, (prefix, folder))), (name,))
        yield from split_parquet(unit) if kind == "parquet" else [unit]


def _unit(kind: SourceKind, uri: str, prefix: str, files: tuple[str, ...]) -> Unit:
    name = "/".join(filter(None, (prefix, *files)))
    return Unit(source=0, number=0, kind=kind, name=name, uri=uri, prefix=prefix, files=files)


def _kind_of_folder(uri: str) -> SourceKind:
    """What a directory holds. Raises MisuseError where nothing in it can be read, or it could be several things."""
    files = [file.name for file in listing.walk(uri)]
    if any(name in HUGGINGFACE for name in files):
        return "huggingface"
    kinds = {KINDS[listing.extension(name)] for name in files if listing.extension(name) in KINDS}
    if any(name.endswith(STATS) for name in files) and kinds & {"webdataset", "parquet"}:
        return "img2dataset"
    if "webdataset" in kinds:
        return "webdataset"
    if any(map(listing.is_image, files)) or not kinds:
        return "folder"
    if len(kinds) > 1:
        raise MisuseError(f"{uri}: holds {', '.join(sorted(kinds))}; say in `kind` which of them is the source")
    return kinds.pop()


def _guarded(unit: Unit, source: SourceConfig) -> Iterator[Found]:
    """What the reader finds, in the unit's split; a file that is gone or closed to us is a row too."""
    try:
        for found in READERS[unit.kind](unit, source):
            if unit.split is not None and isinstance(found.what, Fields) and found.what.split is None:
                found = replace(found, what=replace(found.what, split=unit.split))
            yield found
    except UNREADABLE as error:
        yield Found(0, unit.label(unit.files[0]), unreadable(error))


READERS: dict[SourceKind, Callable[[Unit, SourceConfig], Iterator[Found]]] = {
    "jsonl": lambda unit, source: read_jsonl(unit, source.fields),
    "csv": lambda unit, source: read_csv(unit, source.fields),
    "parquet": lambda unit, source: read_parquet(unit, source.fields),
    "folder": read_folder,
    "webdataset": lambda unit, source: read_webdataset(unit, source.fields),
    "img2dataset": lambda unit, source: read_img2dataset(unit, source.fields),
    "huggingface": lambda unit, source: read_huggingface(unit, source.fields),
    "html": lambda unit, source: read_pages(unit),
}


def _with_fingerprint(unit: Unit, digest: str, lines: int) -> Unit:
    """The unit with its fingerprint; the number of its lines says how many records to expect of a list."""
    if unit.row_groups is not None:
        digest = f"{digest}-{unit.row_groups[0]}-{unit.row_groups[1]}"
    expected = lines if unit.kind in ("jsonl", "csv") and unit.records is None else unit.records
    return replace(unit, fingerprint=digest, records=expected)


def _read_batch(batch: pa.Table, sources: Sequence[SourceConfig]) -> Iterator[pa.Table]:
    for text in batch["unit"].to_pylist():
        fields: dict[str, Any] = json.loads(text)
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        unit = Unit(**fields)
        for rows in read_unit(unit, sources[unit.source]):
            records = rows.to_struct_array().combine_chunks()
            yield pa.table([pa.LargeListArray.from_arrays([0, len(records)], records)], schema=CHUNK)
