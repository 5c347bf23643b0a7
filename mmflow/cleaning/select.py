"""Which records stay: repeated keys, captions of too many images, and duplicates, across all pieces.

Each round deals the remaining records by the hash that it compares, so that equal ones meet in one Ray task. Only
hashes are exchanged; the names for the verdicts and the captions of candidates are read at the end.
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

from mmflow.cleaning.config import DuplicatesConfig
from mmflow.cleaning.duplicates import Hashes, Places, alike_owners, group_buckets, near_owners, run_here, shingles
from mmflow.cleaning.selection_tasks import (
    EVALUATION,
    HELD_OUT,
    KNOWN,
    NAMES,
    ROW_BITS,
    TEXTS,
    File,
    add_counts,
    count_captions,
    deal_bands,
    deal_hashes,
    find_common,
    find_groups,
    find_repeats,
    read_hashes,
    read_names,
    read_texts,
    split_repeats,
)
from mmflow.core.errors import MisuseError, MmflowError
from mmflow.sources.reasons import Reason

REJECTED = pa.schema([("place", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])
# A task reads this many files, some 20,000 records, until that would be more tasks than `MAX_TASKS`. The exchange makes
# an object for each task in each part, so both numbers are bounded.
FILES_PER_TASK, MAX_TASKS, MAX_PARTS = 64, 512, 128
# For fewer hashes the search takes a second or two and gets no tasks of its own.
MAX_SEARCHED_HERE = 100_000
NO_HASHES: Hashes = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Selection:
    """Which records do not stay, and which captions the others lose."""

    rejected: pa.Table  # REJECTED, sorted by place
    common_captions: Hashes  # hashes of case-folded captions, sorted


@dataclass
class Verdicts:
    """The results of the rounds so far."""

    # (reason, places, owners: the places of the records that stay instead, amounts: numbers for the detail)
    rounds: list[tuple[Reason, Places, Places, npt.NDArray[Any]]] = field(default_factory=list)
    rejected: Places = field(default_factory=lambda: np.empty(0, np.int64))  # sorted

    def add(self, reason: Reason, places: Places, owners: Places, amounts: npt.NDArray[Any]) -> None:
        """Add the rejections of a round, (rejected,) each."""
        self.rounds.append((reason, places, owners, amounts))
        self.rejected = np.sort(np.concatenate([self.rejected, places]))


def select_records(
    pieces: Sequence[str],
    *,
    duplicates: DuplicatesConfig,
    max_images: int | None,
    captions_required: bool = True,
    known: Sequence[str] = (),
    known_common: Hashes | None = None,
    evaluation: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """Which of the pieces' good records are rejected, and why. The order of the pieces does not matter.

    `known` are the indexes of the dataset to grow, `evaluation` those of the datasets in `duplicates.against`: their
    samples stay, and reject records like them. `known_common` are the captions that were too common in the dataset to
    grow and that its samples no longer have. If `captions_required`, a record with only common captions is rejected.
    Among the other records, held-out ones stay before those of `train`, then the first by place. Each round looks at
    what the earlier ones left, so a survivor that a record was rejected for may itself be rejected later.
    `progress(done, total)` counts rounds. Raises MisuseError if `evaluation` cannot be compared with,
    MissingArtifactError or CorruptArtifactError if a file cannot be read.
    """
    required = ["pixel_hash"] * duplicates.exact + ["perceptual_hash"] * (duplicates.radius is not None)
    if evaluation and not required and duplicates.caption_similarity is None:
        raise MisuseError("duplicates.against compares nothing: set duplicates.exact, radius or caption_similarity")
    committed = [*((uri, EVALUATION) for uri in evaluation), *((uri, KNOWN) for uri in known)]
    files = [File(uri, rank, number) for number, (uri, rank) in enumerate(committed)] + [File(uri) for uri in pieces]
    if not files:
        return Selection(REJECTED.empty_table(), NO_HASHES)
    step = max(FILES_PER_TASK, -(-len(files) // MAX_TASKS))
    groups = [files[start : start + step] for start in range(0, len(files), step)]
    tables = _read(read_hashes, [(group, required) for group in groups])

    verdicts = Verdicts()
    common = NO_HASHES
    threshold, radius = duplicates.caption_similarity, duplicates.radius
    num_rounds = 2 + sum((max_images is not None, duplicates.exact, radius is not None, threshold is not None))
    rounds = iter(range(1, num_rounds + 1))

    def report() -> None:
        if progress is not None:
            progress(next(rounds), num_rounds)

    _reject_repeats(tables, verdicts, Reason.key_repeated)
    report()
    if max_images is not None:
        common = _reject_common(tables, verdicts, max_images, known_common, captions_required)
        report()
    if duplicates.exact:
        _reject_repeats(tables, verdicts, Reason.duplicate_exact)
        report()
    if radius is not None:
        _reject_near(tables, verdicts, radius)
        report()
    if threshold is not None:
        _reject_alike(groups, tables, verdicts, threshold, common)
        report()
    rejected = _describe(groups, verdicts, num_evaluation=len(evaluation))
    report()
    return Selection(rejected, common)


# --- the rounds -------------------------------------------------------------------------------------------------------


def _reject_repeats(tables: Sequence[Any], verdicts: Verdicts, reason: Reason) -> None:
    """Reject all but the first of the records with one key, or with equal pixels."""
    for places, owners in _exchange(tables, verdicts, find_repeats, reason):
        verdicts.add(reason, places, owners, np.ones(len(places)))


def _reject_common(
    tables: Sequence[Any], verdicts: Verdicts, max_images: int, known: Hashes | None, required: bool
) -> Hashes:
    """Return the captions of more than `max_images` images. If captions are required, reject records with no others.

    `known` captions stay common; how many images they had is no longer known, so it is given as 0.
    """
    gone = ray.put(verdicts.rejected)
    dealt = _deal(count_captions, _num_parts(tables), [(table, gone) for table in tables])
    counted = _results([ray.remote(add_counts).remote(max_images, *part) for part in dealt])
    hashes, counts = (np.concatenate(values) for values in zip(*counted, strict=True))
    before = np.setdiff1d(NO_HASHES if known is None else known, hashes)
    hashes, counts = np.concatenate([hashes, before]), np.concatenate([counts, np.zeros(len(before), counts.dtype)])
    order = np.argsort(hashes)
    common: Hashes = hashes[order]
    if len(common) and required:
        arguments = (gone, ray.put(common), ray.put(counts[order]))
        for places, amounts in _results([ray.remote(find_common).remote(table, *arguments) for table in tables]):
            verdicts.add(Reason.caption_too_common, places, places, amounts)
    return common


def _reject_near(tables: Sequence[Any], verdicts: Verdicts, radius: int) -> None:
    """Records with equal hashes are merged where they meet; then all different hashes are compared."""
    parts = _exchange(tables, verdicts, split_repeats, Reason.duplicate_near)
    places, owners, hashes, ranks, firsts = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.lexsort((firsts, ranks))
    hashes, firsts = hashes[order], firsts[order]
    num_fixed = int(np.count_nonzero(ranks < HELD_OUT))
    index = near_owners(hashes, radius, num_fixed, _run if len(hashes) > MAX_SEARCHED_HERE else run_here)
    bits = np.bitwise_count(hashes ^ hashes[index])
    gone = index != np.arange(len(index))
    by_place = np.argsort(firsts)
    group = by_place[np.searchsorted(firsts[by_place], owners)]  # the position of each repeat's hash among `hashes`
    verdicts.add(
        Reason.duplicate_near,
        np.concatenate([firsts[gone], places]),
        np.concatenate([firsts[index[gone]], firsts[index[group]]]),
        np.concatenate([bits[gone], bits[group]]),
    )


def _reject_alike(
    groups: Sequence[Sequence[File]], tables: Sequence[Any], verdicts: Verdicts, threshold: float, common: Hashes
) -> None:
    """Records with equal captions are merged where they meet; then those that share a MinHash band are compared."""
    repeated = _exchange(tables, verdicts, find_repeats, Reason.duplicate_caption, common)
    repeats, firsts = (np.concatenate(values) for values in zip(*repeated, strict=True))
    gone, shared = ray.put(np.sort(np.concatenate([verdicts.rejected, repeats]))), ray.put(common)
    parts = _num_parts(tables)
    dealt = _deal(deal_bands, parts, [(group, shared, gone, threshold) for group in groups])
    met = _results([ray.remote(find_groups).remote(*part) for part in dealt])
    members = np.concatenate([members for members, _ in met])
    buckets = np.concatenate([numbers * parts + part for part, (_, numbers) in enumerate(met)])
    candidates = ray.put(np.unique(members))
    texts = _results(_read(read_texts, [(group, shared, candidates) for group in groups]))
    table = pa.concat_tables([TEXTS.empty_table(), *texts]).sort_by([("rank", "ascending"), ("place", "ascending")])
    places = table["place"].to_numpy()
    owners, degrees = alike_owners(
        [shingles(text) for text in table["text"].to_pylist()],
        group_buckets(places, members, buckets),
        threshold,
        int(np.count_nonzero(table["rank"].to_numpy() < HELD_OUT)),
    )
    gone_now = owners != np.arange(len(owners))
    places, owners, degrees = places[gone_now], places[owners[gone_now]], degrees[gone_now]
    # A record merged into one that is rejected now is rejected for the same survivor.
    fate = dict(zip(places.tolist(), zip(owners.tolist(), degrees.tolist(), strict=True), strict=True))
    moved = [fate.get(first, (first, 1.0)) for first in firsts.tolist()]
    verdicts.add(
        Reason.duplicate_caption,
        np.concatenate([places, repeats]),
        np.concatenate([owners, np.array([owner for owner, _ in moved], np.int64)]),
        np.concatenate([degrees, np.array([degree for _, degree in moved], np.float64)]),
    )


def _describe(groups: Sequence[Sequence[File]], verdicts: Verdicts, num_evaluation: int) -> pa.Table:
    """`REJECTED`, with the survivors' keys in the details."""
    owners = [owners for reason, _, owners, _ in verdicts.rounds if reason is not Reason.caption_too_common]
    wanted = np.unique(np.concatenate([np.empty(0, np.int64), *owners]))
    names: dict[int, tuple[str, str | None]] = {}
    if len(wanted):
        shared = ray.put(wanted)
        for table in _results(_read(read_names, [(group, shared) for group in groups])):
            fields = (table[name].to_pylist() for name in NAMES.names)
            names.update({place: (key, source) for place, key, source in zip(*fields, strict=True)})
    rows: list[tuple[int, str, str]] = []
    for reason, places, survivors, amounts in verdicts.rounds:
        for place, owner, amount in zip(places.tolist(), survivors.tolist(), amounts.tolist(), strict=True):
            evaluated = owner < 0 and (-1 - owner) >> ROW_BITS < num_evaluation
            verdict = str(Reason.duplicate_of_evaluation if evaluated else reason)
            rows.append((place, verdict, _detail(reason, amount, *names.get(owner, ("", None)))))
    columns = zip(*sorted(rows), strict=True) if rows else ((), (), ())
    return pa.table([list(column) for column in columns], schema=REJECTED)


def _detail(reason: Reason, amount: float, key: str, source: str | None) -> str:
    if reason is Reason.key_repeated:
        return f"an earlier record has this key ({source})" if source else "a sample of the dataset has this key"
    if reason is Reason.caption_too_common:
        return f"{amount:.0f} images have this caption" if amount else "too many images had this caption before"
    if reason is Reason.duplicate_exact:
        return f"the same pixels as {key}"
    if reason is Reason.duplicate_near:
        return f"{amount:.0f} bits from {key}"
    return f"caption {amount:.0%} like that of {key}"


# --- Ray --------------------------------------------------------------------------------------------------------------


def _num_parts(tables: Sequence[Any]) -> int:
    return min(len(tables), MAX_PARTS)


def _exchange(
    tables: Sequence[Any], verdicts: Verdicts, reduce: Callable[..., Any], reason: Reason, common: Hashes = NO_HASHES
) -> list[Any]:
    """The results of `reduce` for each part."""
    gone = ray.put(verdicts.rejected)
    dealt = _deal(deal_hashes, _num_parts(tables), [(table, gone, reason, common) for table in tables])
    return _results([ray.remote(reduce).remote(*part) for part in dealt])


def _deal(function: Callable[..., list[Any]], parts: int, calls: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """For each part, references to what every call dealt to it."""
    if parts == 1:  # Ray does not unpack a list of a single result
        task = ray.remote(lambda *arguments: function(1, *arguments)[0])
        return [tuple(task.remote(*call) for call in calls)]
    split = ray.remote(function).options(num_returns=parts)
    return list(zip(*(split.remote(parts, *call) for call in calls), strict=True))


def _run(function: Callable[..., Any], count: int, *arrays: Any) -> list[Any]:
    """A `Runner` of Ray tasks."""
    shared = [ray.put(array) for array in arrays]
    return _results([ray.remote(function).remote(number, *shared) for number in range(count)])


def _read(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """References to what each call reads. An OSError of the storage may be temporary, so it is retried."""
    task = ray.remote(function).options(retry_exceptions=[OSError])
    return [task.remote(*call) for call in calls]


def _results(references: Sequence[Any]) -> list[Any]:
    """The tasks' results, or the typed error of the first task that failed."""
    try:
        return list(ray.get(list(references)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MmflowError):
            raise error.cause from None
        raise MmflowError(f"selecting records: {type(error.cause).__name__}: {error.cause}; rerun") from error
    except ray.exceptions.RayError as error:
        raise MmflowError(f"selecting records: {' '.join(str(error).split())[:300]}; rerun") from error
