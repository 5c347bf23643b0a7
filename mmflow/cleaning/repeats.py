"""What the tasks of the selection do: deal records by a hash, so that equals meet, and tell who of them goes.

Pure functions of arrays. A deal gives a list of parts, each a tuple of columns of one length; what takes parts takes
any number of them, in any order, and says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmflow.cleaning.columns import (
    EVALUATION,
    HELD_OUT,
    File,
    Hashes,
    Places,
    first_kept,
    is_among,
    list_values,
    read_texts,
)
from mmflow.cleaning.likeness import bands_of_texts
from mmflow.sources.reasons import Reason

Ranks = npt.NDArray[np.int8]
# What travels of each record: hash, the rest of a longer hash, rank and place.
Dealt = tuple[Hashes, Hashes, Ranks, Places]


def deal_hashes(num_parts: int, table: pa.Table, rejected: Places, reason: Reason, common: Hashes) -> list[Dealt]:
    """The records of `HASHES` that are left, dealt by the hash that the round is about; those without it stay out."""
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
    """The places of the records whose hash an earlier one has, and of the first such, (repeats,) each."""
    return split_repeats(*parts)[:2]


def split_repeats(*parts: Dealt) -> tuple[Places, Places, Hashes, Ranks, Places]:
    """`find_repeats`, and the hash, rank and place of each hash's first, (hashes,) each."""
    hashes, check, rank, place = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((place, rank, check, hashes))
    hashes, check, rank, place = hashes[order], check[order], rank[order], place[order]
    new = np.ones(len(hashes), np.bool_)
    new[1:] = (hashes[1:] != hashes[:-1]) | (check[1:] != check[:-1])
    firsts = np.flatnonzero(new)
    owners = place[firsts[np.cumsum(new) - 1]]
    repeats = ~new & (rank >= HELD_OUT)
    return place[repeats], owners[repeats], hashes[firsts], rank[firsts], place[firsts]


def count_captions(num_parts: int, table: pa.Table, rejected: Places) -> list[tuple[Any, ...]]:
    """(hashes, counts) of the records' captions; a caption twice in one record counts once."""
    rank = table["rank"].to_numpy()
    wanted = (rank != EVALUATION) & ~is_among(table["place"].to_numpy(), rejected)
    values, starts = list_values(table["caption_hashes"].combine_chunks().filter(pa.array(wanted)))
    records = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort((records, values))
    values, records = values[order], records[order]
    once = np.ones(len(values), np.bool_)
    once[1:] = (values[1:] != values[:-1]) | (records[1:] != records[:-1])
    hashes, counts = np.unique(values[once], return_counts=True)
    return _split(num_parts, hashes, counts)


def add_counts(max_images: int, *parts: tuple[Any, ...]) -> tuple[Hashes, Places]:
    """The hashes of more than so many images, and of how many."""
    hashes, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    unique, inverse = np.unique(hashes, return_inverse=True)
    totals = np.bincount(inverse, counts, len(unique)).astype(np.int64)
    return unique[totals > max_images], totals[totals > max_images]


def find_common(table: pa.Table, rejected: Places, common: Hashes, counts: Places) -> tuple[Places, Places]:
    """The places of the records that have common captions only, and of how many images the first is."""
    place = table["place"].to_numpy()
    lists = table["caption_hashes"].combine_chunks()
    values, starts = list_values(lists)
    gone = (first_kept(lists, common) < 0) & (np.diff(starts) > 0) & (table["rank"].to_numpy() >= HELD_OUT)
    gone &= ~is_among(place, rejected)
    return place[gone], counts[np.searchsorted(common, values[starts[:-1][gone]])]


def deal_bands(
    num_parts: int, files: Sequence[File], common: Hashes, rejected: Places, threshold: float
) -> list[tuple[Any, ...]]:
    """(hashes, places) of the bands of the records' captions."""
    table = read_texts(files, common, None, rejected)
    bands = bands_of_texts(table["text"].to_pylist(), threshold)
    return _split(num_parts, bands.ravel(), np.repeat(table["place"].to_numpy(), bands.shape[1]))


def find_groups(*parts: tuple[Any, ...]) -> tuple[Places, Places]:
    """(members, groups): the places of records that share a band's hash, and a number for that hash."""
    hashes, places = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    _, numbers, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    shared = counts[numbers] > 1
    return places[shared], numbers[shared].astype(np.int64)


def _split(num_parts: int, hashes: Hashes, *columns: npt.NDArray[Any]) -> list[Any]:
    """The columns dealt by hash. Perceptual hashes are far from evenly spread, so they are mixed first."""
    part = (hashes * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(num_parts)
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(num_parts + 1))
    whole = [column[order] for column in (hashes, *columns)]
    return [tuple(column[ends[n] : ends[n + 1]] for column in whole) for n in range(num_parts)]
