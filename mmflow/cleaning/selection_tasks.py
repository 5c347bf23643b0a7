"""What the tasks of the selection do: read hashes, deal them out so that equal ones meet, and find who is rejected.

Hashes are read first; names and captions later, of the few records that need them. A deal returns a list of parts, each
a tuple of columns of one length. Functions that take parts accept any number of them in any order, with the same
result. A sample of a committed dataset has no place; here it gets a negative one from its file's number and its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from mmflow.cleaning.duplicates import GOLDEN_RATIO, Hashes, Places, bands_of_texts
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.storage import filesystem
from mmflow.sources.reasons import Reason

Ranks = npt.NDArray[np.int8]
# What is exchanged of each record: hash, the rest of a longer hash, rank and place.
Dealt = tuple[Hashes, Hashes, Ranks, Places]

# Who stays among records that are alike: the lowest rank, then the lowest place. Committed samples always stay.
EVALUATION, KNOWN, HELD_OUT, TRAIN = range(4)
ROW_BITS = 32
# A record's hashes. The key's is xxh3_128, in two halves: with 64 bits, a billion keys would collide by chance.
HASHES = pa.schema(
    [
        ("place", pa.int64()),
        ("rank", pa.int8()),
        ("key_low", pa.uint64()),
        ("key_high", pa.uint64()),
        ("pixel_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("caption_hashes", pa.list_(pa.uint64())),
    ]
)
NAMES = pa.schema([("place", pa.int64()), ("key", pa.string()), ("source", pa.string())])
TEXTS = pa.schema([("place", pa.int64()), ("rank", pa.int8()), ("text", pa.string())])


@dataclass(frozen=True)
class File:
    """The table of a piece, or the index of a shard, which has a number."""

    uri: str
    rank: int = TRAIN
    number: int | None = None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_hashes(files: Sequence[File], required: Sequence[str] = ()) -> pa.Table:
    """`HASHES` of the files' good records.

    Raises MisuseError if a dataset for evaluation lacks values in one of the `required` columns.
    """
    return pa.concat_tables([HASHES.empty_table(), *(_hashes_of_file(file, required) for file in files)])


def _hashes_of_file(file: File, required: Sequence[str]) -> pa.Table:
    table = _read(file, ["key", "pixel_hash", "perceptual_hash", "caption_hashes"], ["split"])
    if file.rank == EVALUATION:
        for name in required:
            if table[name].null_count:
                raise MisuseError(
                    f"{file.uri}: {table[name].null_count} samples without {name}, so nothing can be compared with "
                    "them; rebuild that dataset with `mmflow shard`, or remove it from duplicates.against"
                )
    digests = [xxhash.xxh3_128_digest(key.encode()) for key in table["key"].to_pylist()]
    halves = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return pa.table(
        [table["place"], table["rank"], halves[:, 0], halves[:, 1], *(table[name] for name in HASHES.names[4:])],
        schema=HASHES,
    )


def read_names(files: Sequence[File], places: Places) -> pa.Table:
    """`NAMES` of those of the places (sorted) that are in the files."""
    parts = [NAMES.empty_table()]
    for file in files:
        table = _read(file, ["key"], ["source"])
        parts.append(table.filter(pa.array(is_among(table["place"].to_numpy(), places))).select(NAMES.names))
    return pa.concat_tables(parts)


def read_texts(
    files: Sequence[File], common: Hashes, among: Places | None = None, without: Places | None = None
) -> pa.Table:
    """`TEXTS`: each good record's first caption that is not common, of the places `among` and not `without` (sorted).

    The text of a dataset's sample comes from its tar.
    """
    parts = [TEXTS.empty_table()]
    for file in files:
        if file.number is None:
            table = _read(file, ["caption_hashes", "captions"], ["split"])
        else:
            table = _read(file, ["txt_offset", "txt_bytes"], [])
        wanted = np.ones(table.num_rows, np.bool_)
        if among is not None:
            wanted &= is_among(table["place"].to_numpy(), among)
        if without is not None:
            wanted &= ~is_among(table["place"].to_numpy(), without)
        table = table.filter(pa.array(wanted))
        if file.number is None:
            first = first_kept(table["caption_hashes"].combine_chunks(), common)
            table = table.filter(pa.array(first >= 0))
            texts = pc.struct_field(table["captions"].combine_chunks().flatten(), "text")
            counts = pc.list_value_length(table["captions"]).to_numpy().astype(np.int64)
            text = texts.take(pa.array(np.cumsum(counts) - counts + first[first >= 0]))
        else:
            table = table.filter(pc.greater(table["txt_bytes"], 0))  # adopted tars may lack texts
            text = pa.array(_read_bodies(file, table), pa.string())
        parts.append(pa.table([table["place"], table["rank"], text], schema=TEXTS))
    return pa.concat_tables(parts)


def _read(file: File, names: list[str], names_of_pieces: list[str]) -> pa.Table:
    """The named columns of the good records, with `place` and `rank`; `source` is null in an index."""
    system, path = filesystem(file.uri)
    columns = names if file.number is not None else [*names, *names_of_pieces, "place", "reason"]
    try:
        # Not `pq.read_table`, which plans a whole dataset's scan for each of these small files.
        with system.open_input_file(path) as stream:
            table = pq.ParquetFile(stream).read(columns=columns, use_threads=False)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{file.uri}: no such file; rerun the build") from error
    except pa.ArrowInvalid as error:
        raise CorruptArtifactError(f"{file.uri}: cannot be read ({error}); delete it and rebuild") from error
    if missing := set(columns) - set(table.column_names):
        raise CorruptArtifactError(f"{file.uri}: no columns {sorted(missing)}; delete it and rebuild")
    if file.number is not None:
        rows = np.arange(table.num_rows, dtype=np.int64)
        table = table.append_column("place", pa.array(-1 - (file.number << ROW_BITS) - rows))
        table = table.append_column("source", pa.nulls(table.num_rows, pa.string()))
        return table.append_column("rank", pa.array(np.full(table.num_rows, file.rank), pa.int8()))
    table = table.filter(pc.is_null(table["reason"]))
    if "split" in names_of_pieces:
        train = pc.equal(table["split"], "train")
        table = table.append_column("rank", pc.if_else(train, TRAIN, HELD_OUT).cast(pa.int8()))
    return table


def _read_bodies(file: File, table: pa.Table) -> list[str]:
    """The captions of an index's rows, from the tar of its shard."""
    folder, _, name = file.uri.rpartition("/index/")
    system, path = filesystem(f"{folder}/shards/{name}".replace(".parquet", ".tar"))
    try:
        with system.open_input_file(path) as tar:
            ranges = zip(table["txt_offset"].to_pylist(), table["txt_bytes"].to_pylist(), strict=True)
            return [tar.read_at(size, offset).decode(errors="replace") for offset, size in ranges]
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{path}: no such file, but {file.uri} refers to it; run `mmflow verify`") from error


# --- arrays -----------------------------------------------------------------------------------------------------------


def is_among(values: npt.NDArray[Any], members: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each value is one of the sorted `members`, (values,)."""
    if not len(members):
        return np.zeros(len(values), np.bool_)
    among: npt.NDArray[np.bool_] = members[np.minimum(np.searchsorted(members, values), len(members) - 1)] == values
    return among


def list_values(lists: pa.ListArray) -> tuple[Any, Places]:
    """The values of all lists, one after another, and where each list starts, (lists + 1,); a null is an empty list."""
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lists.flatten().to_numpy(), np.concatenate([[0], np.cumsum(counts)])


def first_kept(hashes: pa.ListArray, common: Hashes) -> Places:
    """The number within each list of its first hash that is not common (sorted), or -1, (lists,)."""
    values, starts = list_values(hashes)
    kept = np.flatnonzero(~is_among(values, common))
    following = np.searchsorted(kept, starts[:-1])
    first = np.append(kept, len(values))[following]
    return np.where(first < starts[1:], first - starts[:-1], -1)


def _split(num_parts: int, hashes: Hashes, *columns: npt.NDArray[Any]) -> list[Any]:
    """The columns dealt by hash. Perceptual hashes are far from evenly spread, so they are mixed first."""
    part = (hashes * np.uint64(GOLDEN_RATIO) >> np.uint64(32)) % np.uint64(num_parts)
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(num_parts + 1))
    whole = [column[order] for column in (hashes, *columns)]
    return [tuple(column[ends[n] : ends[n + 1]] for column in whole) for n in range(num_parts)]


# --- equal hashes -----------------------------------------------------------------------------------------------------


def deal_hashes(num_parts: int, table: pa.Table, rejected: Places, reason: Reason, common: Hashes) -> list[Dealt]:
    """The remaining records of `HASHES`, dealt by the hash that the round compares. Records without it are left out."""
    place, rank = table["place"].to_numpy(), table["rank"].to_numpy()
    wanted = ~is_among(place, rejected)
    check = np.zeros(len(place), np.uint64)
    if reason is Reason.key_repeated:
        hashes, check = table["key_low"].to_numpy(), table["key_high"].to_numpy()
        wanted &= rank != EVALUATION
        rank = np.minimum(rank, HELD_OUT)  # of two new records the first stays, whatever their splits
    elif reason is Reason.duplicate_caption:
        lists = table["caption_hashes"].combine_chunks()
        first = first_kept(lists, common)
        values, starts = list_values(lists)
        wanted &= first >= 0
        hashes = np.append(values, np.uint64(0))[np.where(first >= 0, starts[:-1] + first, len(values))]
    else:
        column = table["pixel_hash" if reason is Reason.duplicate_exact else "perceptual_hash"]
        wanted &= ~column.is_null().to_numpy()
        hashes = column.fill_null(0).to_numpy()
    return _split(num_parts, hashes[wanted], check[wanted], rank[wanted], place[wanted])


def find_repeats(*parts: Dealt) -> tuple[Places, Places]:
    """The places of records that repeat an earlier record's hash, and of that hash's first record, (repeats,) each."""
    return split_repeats(*parts)[:2]


def split_repeats(*parts: Dealt) -> tuple[Places, Places, Hashes, Ranks, Places]:
    """`find_repeats`, and the hash, rank and place of each hash's first record, (hashes,) each."""
    hashes, check, rank, place = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((place, rank, check, hashes))
    hashes, check, rank, place = hashes[order], check[order], rank[order], place[order]
    new = np.ones(len(hashes), np.bool_)
    new[1:] = (hashes[1:] != hashes[:-1]) | (check[1:] != check[:-1])
    firsts = np.flatnonzero(new)
    owners = place[firsts[np.cumsum(new) - 1]]
    repeats = ~new & (rank >= HELD_OUT)
    return place[repeats], owners[repeats], hashes[firsts], rank[firsts], place[firsts]


# --- common captions --------------------------------------------------------------------------------------------------


def count_captions(num_parts: int, table: pa.Table, rejected: Places) -> list[tuple[Any, ...]]:
    """(hashes, counts) of the records' captions. A caption that repeats within a record counts once."""
    wanted = (table["rank"].to_numpy() != EVALUATION) & ~is_among(table["place"].to_numpy(), rejected)
    values, starts = list_values(table["caption_hashes"].combine_chunks().filter(pa.array(wanted)))
    records = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort((records, values))
    values, records = values[order], records[order]
    once = np.ones(len(values), np.bool_)
    once[1:] = (values[1:] != values[:-1]) | (records[1:] != records[:-1])
    hashes, counts = np.unique(values[once], return_counts=True)
    return _split(num_parts, hashes, counts)


def add_counts(max_images: int, *parts: tuple[Any, ...]) -> tuple[Hashes, Places]:
    """The hashes of captions of more than `max_images` images, and the number of images."""
    hashes, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    unique, inverse = np.unique(hashes, return_inverse=True)
    totals = np.bincount(inverse, counts, len(unique)).astype(np.int64)
    return unique[totals > max_images], totals[totals > max_images]


def find_common(table: pa.Table, rejected: Places, common: Hashes, counts: Places) -> tuple[Places, Places]:
    """The places of records that only have common captions, and the number of images of the first one."""
    place = table["place"].to_numpy()
    lists = table["caption_hashes"].combine_chunks()
    values, starts = list_values(lists)
    gone = (first_kept(lists, common) < 0) & (np.diff(starts) > 0) & (table["rank"].to_numpy() >= HELD_OUT)
    gone &= ~is_among(place, rejected)
    return place[gone], counts[np.searchsorted(common, values[starts[:-1][gone]])]


# --- alike captions ---------------------------------------------------------------------------------------------------


def deal_bands(
    num_parts: int, files: Sequence[File], common: Hashes, rejected: Places, threshold: float
) -> list[tuple[Any, ...]]:
    """(hashes, places) of the MinHash bands of the records' captions."""
    table = read_texts(files, common, None, rejected)
    bands = bands_of_texts(table["text"].to_pylist(), threshold)
    return _split(num_parts, bands.ravel(), np.repeat(table["place"].to_numpy(), bands.shape[1]))


def find_groups(*parts: tuple[Any, ...]) -> tuple[Places, Places]:
    """(members, groups): the places of records that share a band's hash, and a number for that hash."""
    hashes, places = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    _, numbers, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    shared = counts[numbers] > 1
    return places[shared], numbers[shared].astype(np.int64)
