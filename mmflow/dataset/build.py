"""Records to a committed dataset, on Ray: prepare every record once, select, deal the rows out by hash, write shards.

    sources ─▶ records ─▶ pieces ─▶ verdicts ─▶ shards, index, quarantine

Reading and preparing is one streaming Ray Data job. Rows are exchanged by plain Ray tasks and not by
`groupby().map_groups()`, which took 9 to 20 s on two CPUs for 4,500 rows where this takes under one, and which reports
no progress until a block of several shards is done. Here a retried task is exactly one bucket of shards, and finished
shards are recognised by their plan.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions

from mmflow.cleaning.prepare import TRAIN, Preparation, pack_uri, prepare_block, read_piece
from mmflow.cleaning.select import select_records
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import MmflowError
from mmflow.dataset.config import ShardConfig
from mmflow.dataset.format import (
    ShardCommit,
    ShardInfo,
    fingerprint_of,
    index_uri,
    read_index,
    remove_strays,
    shard_name,
    totals_of,
)
from mmflow.dataset.grow import bring_over, read_common, settings_of_build, write_common
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.write import (
    Extent,
    bucket_of,
    deal,
    extents_of_splits,
    shards_of_splits,
    span,
    with_verdicts,
    write_shards,
)
from mmflow.sources.config import SourceConfig
from mmflow.sources.records import Unit
from mmflow.sources.sources import PREPARE_CPUS, read_chunks

# A bucket is one task. The exchange makes an object for each group of pieces in each bucket, so their number is
# bounded. It also bounds how much of the metadata one worker holds: a 512th.
MAX_BUCKETS = 512
RECORDS_PER_GROUP = 100_000  # rows of pieces that one task of the exchange reads

ERROR_LINE = re.compile(r"^(?:[a-z_]+\.)*([A-Z]\w*(?:Error|Exception): .+)$", re.MULTILINE)
WRAPPERS = ("UserCodeException", "RayTaskError")

Progress = Callable[[int, int, str], None]
"""(done, total, unit)."""


def build_dataset(
    uri: str,
    *,
    sources: Sequence[SourceConfig],
    units: Sequence[Unit],
    settings: ShardConfig,
    fetched: str | None = None,
    base: Dataset | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Build the shards, indexes and quarantine of the dataset at `uri`; return the manifest's fields, uncommitted.

    `units` are the units of the sources that `base`, the dataset to grow, does not have yet. The same records, settings
    and base give the same bytes, however many workers there are, and however often a killed build is rerun in the same
    place. Raises MmflowError if a shard cannot be written, if no sample is left, or if the totals do not balance.
    """
    preparation = Preparation(
        dataset=uri,
        image=settings.image,
        captions=settings.captions,
        splits=settings.splits,
        group_by=settings.group_by,
        fetched=fetched,
    )
    kept = bring_over(base, uri) if base else []
    pieces = prepare_all(units, sources, preparation, progress)
    num_records = sum(pieces.values())
    if not num_records and not kept:
        raise MmflowError(f"{uri}: the sources hold no record")
    selection = select_records(
        sorted(pieces),
        duplicates=settings.duplicates,
        max_images=settings.captions.max_images,
        captions_required=settings.captions.required,
        known=[index_uri(base.uri, shard.name) for shard in kept] if base else [],
        known_common=read_common(base.uri) if base else None,
        evaluation=[
            index_uri(dataset.uri, shard.name)
            for dataset in map(open_dataset, settings.duplicates.against)
            for split in dataset.splits
            for shard in dataset.shards(split)
        ],
        progress=lambda done, total: progress(done, total, "comparisons"),
    )
    groups = group_pieces(pieces)
    rejected = ray.put(selection.rejected)
    first = max((int(shard.name) + 1 for shard in kept), default=0)
    shards = plan_shards(groups, rejected, settings, first) if num_records else {}
    commits = {shard.name: read_index(index_uri(uri, shard.name))[1] for shard in kept}
    if shards:
        made_with = canonical_json(preparation.settings)
        written = write_all(uri, groups, rejected, shards, settings.seed, made_with, selection.common_captions)
        for done, (number, commit) in enumerate(written, 1):
            commits[shard_name(number)] = commit
            progress(done, len(span(shards)), "shards")
    infos = kept + [
        commits[shard_name(number)].info(shard_name(number), split)
        for split, numbers in shards.items()
        for number in numbers
    ]
    remove_strays(uri, commits, [name for name, commit in commits.items() if commit.quarantined])
    write_common(uri, selection.common_captions)
    totals = check_totals(uri, infos, commits, num_records + (base.manifest["totals"]["records"] if base else 0))
    return {
        "fingerprint": fingerprint_of(infos),
        "shards": [asdict(info) for info in infos],
        "totals": totals,
        "settings": settings_of_build(settings),
        **({"grown_from": base.fingerprint} if base else {}),
    }


def check_totals(
    uri: str, infos: Sequence[ShardInfo], commits: Mapping[str, ShardCommit], num_records: int
) -> dict[str, Any]:
    """The manifest's totals. Raises MmflowError if there is no sample, or if a record is lost or counted twice."""
    reasons: Counter[str] = Counter()
    for commit in commits.values():
        reasons.update(commit.reasons)
    totals = totals_of(infos, reasons)
    if totals["records"] != num_records:
        raise MmflowError(
            f"{num_records} records were read, but there are {totals['samples']} samples and {totals['quarantined']} "
            "in quarantine: this is a bug in mmflow, please report it"
        )
    if not totals["samples"]:
        raise MmflowError(f"{uri}: none of {num_records} records gave a sample: {totals['reasons']}; see quarantine/")
    return totals


def prepare_all(
    units: Sequence[Unit], sources: Sequence[SourceConfig], preparation: Preparation, progress: Progress
) -> dict[str, int]:
    """Prepare every record; return the pieces' URIs and how many records each has."""
    pieces: dict[str, int] = {}
    if not units:
        return pieces
    expected = sum(unit.records or 0 for unit in units)
    prepared = read_chunks(units, sources).map_batches(
        partial(prepare_block, preparation=preparation),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=PREPARE_CPUS,
    )
    try:
        batch: Any
        for batch in prepared.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            pieces.update(zip(batch["piece"].to_pylist(), batch["records"].to_pylist(), strict=True))
            done = sum(pieces.values())
            progress(done, max(expected, done), "records")
    except (ray.exceptions.RayTaskError, ray.exceptions.RayError) as error:
        raise failure(error, f"{preparation.dataset}: preparing records", "finished pieces are kept") from error
    return pieces


def group_pieces(pieces: Mapping[str, int]) -> list[list[str]]:
    """The pieces, sorted, in groups with about equal numbers of records: one task reads a group."""
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    num_groups = min(len(pieces), max(cpus, -(-sum(pieces.values()) // RECORDS_PER_GROUP)))
    groups = np.array_split(np.array(sorted(pieces), dtype=object), num_groups) if pieces else []
    return [group.tolist() for group in groups]


def read_group(pieces: Sequence[str], rejected: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a group of pieces with their verdicts, and `pack`: the URI of each row's images."""
    tables = []
    for piece in pieces:
        rows = read_piece(piece, columns)
        pack = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows.num_rows, np.int32)), [pack_uri(piece)])
        tables.append(rows.append_column("pack", pack.cast(pa.string())))
    return with_verdicts(pa.concat_tables(tables), rejected)


def measure_group(pieces: Sequence[str], rejected: pa.Table) -> dict[str, Extent]:
    """The extent of the rows that stay, by split."""
    columns = ("place", "split", "image_bytes", "frames", "reason", "detail")
    return extents_of_splits(read_group(pieces, rejected, columns))


def deal_group(
    pieces: Sequence[str], rejected: pa.Table, shards: Mapping[str, range], seed: int, num_buckets: int
) -> pa.Table | tuple[pa.Table, ...]:
    """The rows of a group, by bucket; a single bucket is returned bare, as Ray expects of a task with one result."""
    dealt = deal(read_group(pieces, rejected), shards, seed, num_buckets)
    return dealt[0] if num_buckets == 1 else dealt


def plan_shards(groups: Sequence[Sequence[str]], rejected: Any, settings: ShardConfig, first: int) -> dict[str, range]:
    """Each split's shards. If every record is rejected, there is one empty shard that has their quarantine."""
    measure = ray.remote(measure_group).options(retry_exceptions=[OSError])
    extents: dict[str, Extent] = {}
    try:
        measured = ray.get([measure.remote(group, rejected) for group in groups])
    except ray.exceptions.RayError as error:
        raise failure(error, "measuring the pieces", "finished pieces are kept") from error
    for extents_of_group in measured:
        for split, extent in extents_of_group.items():
            so_far = extents.get(split, Extent(0, 0))
            extents[split] = Extent(so_far.samples + extent.samples, so_far.bytes + extent.bytes)
    shards = shards_of_splits(extents, settings.samples_per_shard, settings.bytes_per_shard, first)
    return shards or {TRAIN: range(first, first + 1)}


def write_all(
    uri: str,
    groups: Sequence[Sequence[str]],
    rejected: Any,
    shards: Mapping[str, range],
    seed: int,
    settings: str,
    common_captions: Any,
) -> Iterator[tuple[int, ShardCommit]]:
    """Every shard's number and commit, as they complete."""
    first, num_shards = span(shards).start, len(span(shards))
    num_buckets = min(num_shards, MAX_BUCKETS)
    deal_rows = ray.remote(deal_group).options(num_returns=num_buckets, retry_exceptions=[OSError])
    dealt = [deal_rows.remote(group, rejected, shards, seed, num_buckets) for group in groups]
    buckets = list(zip(*dealt, strict=True)) if num_buckets > 1 else [tuple(dealt)]
    bucket_of_shard = bucket_of(np.arange(num_shards), num_shards, num_buckets).tolist()
    numbers_of_bucket = [
        [first + shard for shard, _ in run] for _, run in groupby(enumerate(bucket_of_shard), itemgetter(1))
    ]
    # Ray itself retries a task after its worker died; an OSError of the storage may be temporary.
    write = ray.remote(write_shards).options(retry_exceptions=[OSError], scheduling_strategy="SPREAD")
    waiting = {
        write.remote(uri, numbers, settings, common_captions, *parts): numbers
        for numbers, parts in zip(numbers_of_bucket, buckets, strict=True)
    }
    while waiting:
        done, _ = ray.wait(list(waiting))
        for reference in done:
            numbers = waiting.pop(reference)
            try:
                commits = ray.get(reference)
            except ray.exceptions.RayError as error:
                names = ", ".join(shard_name(number) for number in numbers)
                raise failure(error, f"{uri}: shard {names}", "finished shards are kept") from error
            yield from zip(numbers, commits, strict=True)


def failure(error: Exception, where: str, kept: str) -> MmflowError:
    """A task's failure as one line."""
    cause: Any = getattr(error, "cause", None)
    if isinstance(cause, MmflowError):
        return cause
    what = f"{type(cause).__name__}: {cause}" if cause is not None else " ".join(str(error).split())[:300]
    # Ray Data wraps an error within it in an exception of its own, which only has the text of the traceback.
    lines = [line for line in ERROR_LINE.findall(str(error)) if not line.startswith(WRAPPERS)]
    if lines and type(cause).__name__ in WRAPPERS:
        what = lines[-1]
    return MmflowError(f"{where}: {what}; fix the cause and rerun: {kept}")
