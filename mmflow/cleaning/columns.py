"""What the selection reads of pieces and indexes: hashes first, names and captions of the few that matter later.

A sample of a committed dataset has no place; here it gets a negative one, made of its file's number and its row.
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

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.storage import filesystem

Places = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
# Who stays of those that are alike: the least rank, then the least place. What is committed stays always.
EVALUATION, KNOWN, HELD_OUT, TRAIN = range(4)
ROW_BITS = 32
# A record's hashes. The key's is xxh3_128, in two halves: at 64 bits, a billion keys would meet by chance.
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
    """A piece's table, or the index of a shard, which has a number."""

    uri: str
    rank: int = TRAIN
    number: int | None = None


def committed_place(number: int, rows: int) -> Places:
    """The places of the rows of the index of this number, (rows,)."""
    places: Places = -1 - (number << ROW_BITS) - np.arange(rows, dtype=np.int64)
    return places


def read_hashes(files: Sequence[File], required: Sequence[str] = ()) -> pa.Table:
    """`HASHES` of the files' good records.

    Raises MisuseError where a dataset that is evaluated on lacks one of the `required` columns' values.
    """
    return pa.concat_tables([HASHES.empty_table(), *(_hashes_of_file(file, required) for file in files)])


def _hashes_of_file(file: File, required: Sequence[str]) -> pa.Table:
    table = _read(file, ["key", "pixel_hash", "perceptual_hash", "caption_hashes"], ["split"])
    if file.rank == EVALUATION:
        for name in required:
            if table[name].null_count:
                raise MisuseError(
                    f"{file.uri}: {table[name].null_count} samples without {name}, so nothing can be compared with "
                    "them; rebuild that dataset with `mmflow shard`, or take it from duplicates.against"
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
    """`TEXTS`: the first caption that is not common of each good record, in any case of those `among`, sorted places.

    Those `without`, sorted, are left out. A sample of a dataset has the text in its tar.
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


def first_kept(hashes: pa.ListArray, common: Hashes) -> Places:
    """Of each list the number of the first hash that is not among the common ones (sorted), -1 where none, (lists,)."""
    values, starts = list_values(hashes)
    kept = np.flatnonzero(~is_among(values, common))
    following = np.searchsorted(kept, starts[:-1])
    first = np.append(kept, len(values))[following]
    return np.where(first < starts[1:], first - starts[:-1], -1)


def list_values(lists: pa.ListArray) -> tuple[Any, Places]:
    """The values of all lists, one after another, and where each list starts, (lists + 1,); a null is an empty list."""
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lists.flatten().to_numpy(), np.concatenate([[0], np.cumsum(counts)])


def is_among(values: npt.NDArray[Any], some: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each value is one of the sorted `some`, (values,)."""
    if not len(some):
        return np.zeros(len(values), np.bool_)
    found: npt.NDArray[np.bool_] = some[np.minimum(np.searchsorted(some, values), len(some) - 1)] == values
    return found


def _read(file: File, names: list[str], names_of_pieces: list[str]) -> pa.Table:
    """The named columns of the good records, with `place` and `rank`; `source` is null in an index."""
    system, path = filesystem(file.uri)
    piece = file.number is None
    columns = [*names, *names_of_pieces, "place", "reason"] if piece else names
    try:
        # Not `pq.read_table`, which plans a whole dataset's scan for each of these small files.
        with system.open_input_file(path) as stream:
            table = pq.ParquetFile(stream).read(columns=columns, use_threads=False)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{file.uri}: no such file; rerun the build") from error
    except pa.ArrowInvalid as error:
        raise CorruptArtifactError(f"{file.uri}: cannot be read ({error}); delete it and rebuild") from error
    missing = set(columns) - set(table.column_names)
    if missing:
        raise CorruptArtifactError(f"{file.uri}: no columns {sorted(missing)}; delete it and rebuild")
    if not piece:
        table = table.append_column("place", pa.array(committed_place(file.number or 0, table.num_rows)))
        table = table.append_column("source", pa.nulls(table.num_rows, pa.string()))
        return table.append_column("rank", pa.array(np.full(table.num_rows, file.rank), pa.int8()))
    table = table.filter(pc.is_null(table["reason"]))
    if "split" in names_of_pieces:
        train = pc.equal(table["split"], "train")
        table = table.append_column("rank", pc.if_else(train, TRAIN, HELD_OUT).cast(pa.int8()))
    return table


def _read_bodies(file: File, table: pa.Table) -> list[str]:
    """The captions of an index's rows, out of the tar beside it."""
    folder, _, name = file.uri.rpartition("/index/")
    system, path = filesystem(f"{folder}/shards/{name}".replace(".parquet", ".tar"))
    try:
        with system.open_input_file(path) as tar:
            ranges = zip(table["txt_offset"].to_pylist(), table["txt_bytes"].to_pylist(), strict=True)
            return [tar.read_at(size, offset).decode(errors="replace") for offset, size in ranges]
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{path}: no such file, but {file.uri} speaks of it; run `mmflow verify`") from error
