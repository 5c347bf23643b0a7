"""Which records stay: repeated keys, captions of too many images, and duplicates, over all pieces at once.

Each round deals what the rounds before left out by the hash in question, so that equals meet in one Ray task; only
hashes travel. What is to be named in the verdicts, and the captions of candidates, are read when all is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.exceptions

from mmflow.errors import MisuseError, MmflowError
from mmflow.ingest.config import DuplicatesConfig
from mmflow.ingest.duplicates import near_owners, run_here
from mmflow.ingest.likeness import alike_owners, bands_of_texts, group_buckets, shingles
from mmflow.ingest.reasons import Reason
from mmflow.shards.columns import (
    EVALUATION,
    HELD_OUT,
    KNOWN,
    NAMES,
    ROW_BITS,
    TEXTS,
    File,
    Hashes,
    Places,
    first_kept,
    is_among,
    list_values,
    read_hashes,
    read_names,
    read_texts,
)

REJECTED = pa.schema([("place", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])
# A task reads so many files, some 20,000 records, until there would be more tasks than this; the exchange makes an
# object for each task in each part, so that both are bounded.
FILES_PER_TASK, MAX_TASKS, MAX_PARTS = 64, 512, 128
# Below so many hashes the search takes less than starting a task for each band.
MIN_SEARCH = 20_000
# What travels: (hash, check, rank, place) of each record, numpy arrays of one length.
Dealt = tuple[Hashes, Hashes, npt.NDArray[np.int8], Places]


@dataclass(frozen=True)
class Selection:
    """What does not stay, and which captions the rest must lose."""

    rejected: pa.Table  # REJECTED, sorted by place
    common_captions: Hashes  # hashes of case-folded captions, sorted


@dataclass
class Verdicts:
    """The rounds' results so far."""

    # (reason, places, owners: places of who stays instead, amounts: what the detail counts)
    rounds: list[tuple[Reason, Places, Places, npt.NDArray[Any]]] = field(default_factory=list)
    rejected: Places = field(default_factory=lambda: np.empty(0, np.int64))  # sorted

    def add(self, reason: Reason, places: Places, owners: Places, amounts: npt.NDArray[Any]) -> None:
        """A round's rejections, (rejected,) each."""
        self.rounds.append((reason, places, owners, amounts))
        self.rejected = np.sort(np.concatenate([self.rejected, places]))


def select_records(
    pieces: Sequence[str],
    *,
    duplicates: DuplicatesConfig,
    max_images: int | None,
    known: Sequence[str] = (),
    evaluation: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """Which of the pieces' good records are rejected, and why; in any order of the pieces the same.

    `known` are the indexes of the dataset that is being grown, `evaluation` those of the datasets in
    `duplicates.against`: their samples stay, and reject what is like them. Of the others held-out records stay before
    those of `train`, then the first by place. `progress(done, total)` counts rounds. Raises MisuseError where
    `evaluation` cannot be compared with, MissingArtifactError or CorruptArtifactError where a file cannot be read.
    """
    required = ["pixel_hash"] * duplicates.exact + ["perceptual_hash"] * (duplicates.radius is not None)
    if evaluation and not required and duplicates.caption_similarity is None:
        raise MisuseError("duplicates.against compares nothing: set duplicates.exact, radius or caption_similarity")
    committed = [*((uri, EVALUATION) for uri in evaluation), *((uri, KNOWN) for uri in known)]
    files = [File(uri, rank, number) for number, (uri, rank) in enumerate(committed)] + [File(uri) for uri in pieces]
    step = max(FILES_PER_TASK, -(-len(files) // MAX_TASKS))
    groups = [files[start : start + step] for start in range(0, len(files), step)]
    tables = [ray.remote(read_hashes).remote(group, required) for group in groups]

    verdicts = Verdicts()
    common: Hashes = np.empty(0, np.uint64)
    rounds: list[Callable[[], None]] = [lambda: _reject_repeats(tables, verdicts, Reason.key_repeated, common)]
    if max_images is not None:

        def reject_common() -> None:
            nonlocal common
            common = _reject_common(tables, verdicts, max_images)

        rounds.append(reject_common)
    if duplicates.exact:
        rounds.append(lambda: _reject_repeats(tables, verdicts, Reason.duplicate_exact, common))
    if (radius := duplicates.radius) is not None:
        rounds.append(lambda: _reject_near(tables, verdicts, radius))
    if (threshold := duplicates.caption_similarity) is not None:
        rounds.append(lambda: _reject_alike(groups, tables, verdicts, threshold, common))
    for done, run_round in enumerate(rounds):
        if progress is not None:
            progress(done, len(rounds) + 1)
        run_round()
    rejected = _describe(groups, verdicts, num_evaluation=len(evaluation))
    if progress is not None:
        progress(len(rounds) + 1, len(rounds) + 1)
    return Selection(rejected, common)


# --- the rounds -----------------------------------------------------------------------------------------------------


def _reject_repeats(tables: Sequence[Any], verdicts: Verdicts, reason: Reason, common: Hashes) -> None:
    """Of records with the same key, pixels or first caption all go but the first."""
    for places, owners in _exchange(tables, verdicts, find_repeats, reason, common):
        verdicts.add(reason, places, owners, np.ones(len(places)))


def _reject_common(tables: Sequence[Any], verdicts: Verdicts, max_images: int) -> Hashes:
    """Find the captions of more than so many images, which are returned, and reject the records of no others."""
    parts = _num_parts(tables)
    gone = ray.put(verdicts.rejected)
    dealt = _deal(count_captions, parts, [(table, gone) for table in tables])
    found = _results([ray.remote(add_counts).remote(max_images, *part) for part in dealt])
    hashes, counts = (np.concatenate(values) for values in zip(*found, strict=True))
    order = np.argsort(hashes)
    common: Hashes = hashes[order]
    if len(common):
        arguments = (gone, ray.put(common), ray.put(counts[order]))
        for places, amounts in _results([ray.remote(find_common).remote(table, *arguments) for table in tables]):
            verdicts.add(Reason.caption_too_common, places, places, amounts)
    return common


def _reject_near(tables: Sequence[Any], verdicts: Verdicts, radius: int) -> None:
    """Equal hashes are collapsed where they meet; the different ones are compared with all."""
    found = _exchange(tables, verdicts, split_repeats, Reason.duplicate_near, np.empty(0, np.uint64))
    places, owners, hashes, ranks, firsts = (np.concatenate(values) for values in zip(*found, strict=True))
    order = np.lexsort((firsts, ranks))
    hashes, firsts = hashes[order], firsts[order]
    num_fixed = int(np.count_nonzero(ranks < HELD_OUT))
    index = near_owners(hashes, radius, num_fixed, _run if len(hashes) > MIN_SEARCH else run_here)
    bits = np.bitwise_count(hashes ^ hashes[index])
    gone = index != np.arange(len(index))
    by_place = np.argsort(firsts)
    group = by_place[np.searchsorted(firsts[by_place], owners)]  # of each repeat, where its hash's first stands
    verdicts.add(
        Reason.duplicate_near,
        np.concatenate([firsts[gone], places]),
        np.concatenate([firsts[index[gone]], firsts[index[group]]]),
        np.concatenate([bits[gone], bits[group]]),
    )


def _reject_alike(
    groups: Sequence[Sequence[File]], tables: Sequence[Any], verdicts: Verdicts, threshold: float, common: Hashes
) -> None:
    """Equal captions are collapsed first; of the others those that share a band of MinHash are read and compared."""
    _reject_repeats(tables, verdicts, Reason.duplicate_caption, common)
    gone, shared = ray.put(verdicts.rejected), ray.put(common)
    parts = _num_parts(tables)
    dealt = _deal(deal_bands, parts, [(group, shared, gone, threshold) for group in groups])
    found = _results([ray.remote(find_groups).remote(*part) for part in dealt])
    members = np.concatenate([members for members, _ in found])
    buckets = np.concatenate([numbers * parts + part for part, (_, numbers) in enumerate(found)])
    candidates = ray.put(np.unique(members))
    read = ray.remote(read_texts)
    texts = _results([read.remote(group, shared, candidates) for group in groups])
    table = pa.concat_tables([TEXTS.empty_table(), *texts]).sort_by([("rank", "ascending"), ("place", "ascending")])
    places = table["place"].to_numpy()
    index_of_place = {place: index for index, place in enumerate(places.tolist())}
    owners, degrees = alike_owners(
        [shingles(text) for text in table["text"].to_pylist()],
        group_buckets(index_of_place, members, buckets),
        threshold,
        int(np.count_nonzero(table["rank"].to_numpy() < HELD_OUT)),
    )
    index = np.array(owners, np.int64)
    gone_now = index != np.arange(len(index))
    # Who was collapsed into one that goes now, goes for the same survivor.
    survivor = dict(zip(places[gone_now].tolist(), places[index[gone_now]].tolist(), strict=True))
    degree = dict(zip(places[gone_now].tolist(), np.array(degrees)[gone_now].tolist(), strict=True))
    for number, (reason, repeats, firsts, amounts) in enumerate(verdicts.rounds):
        if reason is Reason.duplicate_caption:
            moved = np.array([survivor.get(first, first) for first in firsts.tolist()], np.int64)
            lowered = [degree.get(first, 1.0) for first in firsts.tolist()]
            verdicts.rounds[number] = (reason, repeats, moved, np.minimum(amounts, lowered))
    verdicts.add(Reason.duplicate_caption, places[gone_now], places[index[gone_now]], np.array(degrees)[gone_now])


def _describe(groups: Sequence[Sequence[File]], verdicts: Verdicts, num_evaluation: int) -> pa.Table:
    """`REJECTED`, with the survivors' keys in the details."""
    owners = [owners for reason, _, owners, _ in verdicts.rounds if reason is not Reason.caption_too_common]
    wanted = np.unique(np.concatenate([np.empty(0, np.int64), *owners]))
    names: dict[int, tuple[str, str | None]] = {}
    if len(wanted):
        shared = ray.put(wanted)
        read = ray.remote(read_names)
        for table in _results([read.remote(group, shared) for group in groups]):
            columns = (table[name].to_pylist() for name in NAMES.names)
            names.update({place: (key, source) for place, key, source in zip(*columns, strict=True)})
    rows = []
    for reason, places, survivors, amounts in verdicts.rounds:
        for place, owner, amount in zip(places.tolist(), survivors.tolist(), amounts.tolist(), strict=True):
            key, source = names.get(owner, ("", None))
            against = owner < 0 and -1 - owner >> ROW_BITS < num_evaluation
            rows.append(
                {
                    "place": place,
                    "reason": str(Reason.duplicate_of_evaluation if against else reason),
                    "detail": _detail(reason, amount, key, source),
                }
            )
    return pa.Table.from_pylist(rows, REJECTED).sort_by("place")


def _detail(reason: Reason, amount: float, key: str, source: str | None) -> str:
    if reason is Reason.key_repeated:
        return f"an earlier record has this key ({source})" if source else "a sample of the dataset has this key"
    if reason is Reason.caption_too_common:
        return f"{amount:.0f} images have this caption"
    if reason is Reason.duplicate_exact:
        return f"the same pixels as {key}"
    if reason is Reason.duplicate_near:
        return f"{amount:.0f} bits from {key}"
    return f"caption {amount:.0%} like that of {key}"


# --- tasks ----------------------------------------------------------------------------------------------------------


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


def split_repeats(*parts: Dealt) -> tuple[Places, Places, Hashes, npt.NDArray[np.int8], Places]:
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


# --- Ray ------------------------------------------------------------------------------------------------------------


def _num_parts(tables: Sequence[Any]) -> int:
    return min(len(tables), MAX_PARTS)


def _exchange(
    tables: Sequence[Any], verdicts: Verdicts, reduce: Callable[..., Any], reason: Reason, common: Hashes
) -> list[Any]:
    """What `reduce` makes of each part."""
    gone = ray.put(verdicts.rejected)
    dealt = _deal(deal_hashes, _num_parts(tables), [(table, gone, reason, common) for table in tables])
    return _results([ray.remote(reduce).remote(*part) for part in dealt])


def _deal(function: Callable[..., list[Any]], parts: int, calls: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """References to the parts, each with what every call gave to it."""
    if parts == 1:  # Ray takes a single result as it is, not in a list
        task = ray.remote(lambda *arguments: function(1, *arguments)[0])
        return [tuple(task.remote(*call) for call in calls)]
    split = ray.remote(function).options(num_returns=parts)
    return list(zip(*(split.remote(parts, *call) for call in calls), strict=True))


def _run(function: Callable[..., Any], count: int, *arrays: Any) -> list[Any]:
    """A `Runner` of Ray tasks."""
    shared = [ray.put(array) for array in arrays]
    return _results([ray.remote(function).remote(number, *shared) for number in range(count)])


def _results(references: Sequence[Any]) -> list[Any]:
    """What the tasks returned, or the typed error of the first that failed."""
    try:
        return list(ray.get(list(references)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MmflowError):
            raise error.cause from None
        raise MmflowError(f"selecting records: {type(error.cause).__name__}: {error.cause}; rerun") from error
