"""Records to a committed dataset, on Ray: prepare every record once, select, deal the rows out by hash, write shards.

    sources ─▶ records ─▶ pieces ─▶ verdicts ─▶ shards, index, quarantine

Reading and preparing is one streaming Ray Data job. Rows are exchanged by plain Ray tasks and not by
`groupby().map_groups()`: on two CPUs that took 9 to 20 s for 4,500 rows where this takes under one; it reports nothing
until a block of several shards is through; and a task retried here is exactly one bucket of shards, of which those that
were finished are recognised by their plan.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions
from pyarrow import fs

from mmflow.cleaning.prepare import TRAIN, Preparation, pack_uri, prepare_block, read_piece
from mmflow.cleaning.select import select_records
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import MmflowError
from mmflow.core.storage import filesystem, join
from mmflow.dataset.config import ShardConfig
from mmflow.dataset.exchange import Extent, bucket_of, deal, extents_of_splits, shards_of_splits, span, with_verdicts
from mmflow.dataset.grow import bring_over, read_common, settings_of_build, write_common
from mmflow.dataset.index import ShardCommit, read_commit
from mmflow.dataset.manifest import ShardInfo, fingerprint_of, index_uri, shard_name
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.write import write_shards
from mmflow.sources.config import SourceConfig
from mmflow.sources.records import Unit
from mmflow.sources.sources import PREPARE_CPUS, read_chunks

# A bucket is one task. The exchange makes an object for each group of pieces in each bucket, so their number is
# bounded; it is also the bound on how much of the metadata one worker holds: a 512th.
MAX_BUCKETS = 512
RECORDS_PER_GROUP = 100_000  # rows of pieces that one task of the exchange reads

ERROR_LINE = re.compile(r"^(?:[a-z_]+\.)*([A-Z]\w*(?:Error|Exception): .+)$", re.MULTILINE)
WRAPPERS = ("UserCodeException", "RayTaskError")

Progress = Callable[[int, int, str], None]
"""(done, total, what of)."""


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

    `units` are those of the sources that `base`, the dataset to grow, has not seen. The same records, settings and base
    give the same bytes, however many workers, and however often a killed build is rerun in the same place. Raises
    MmflowError where a shard cannot be written, where no sample is left, or where the totals do not balance.
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
            index_uri(each.uri, shard.name)
            for each in map(open_dataset, settings.duplicates.against)
            for split in each.splits
            for shard in each.shards(split)
        ],
        progress=lambda done, total: progress(done, total, "comparisons"),
    )
    groups = group_pieces(pieces)
    rejected = ray.put(selection.rejected)
    first = max((int(shard.name) + 1 for shard in kept), default=0)
    shards = plan_shards(groups, rejected, settings, first) if num_records else {}
    commits: dict[int, ShardCommit] = {}
    if shards:
        num_shards = len(span(shards))
        made_with = canonical_json(preparation.settings)
        for number, commit in write_all(
            uri, groups, rejected, shards, settings.seed, made_with, selection.common_captions
        ):
            commits[number] = commit
            progress(len(commits), num_shards, "shards")
    infos = kept + [
        shard_info(number, split, commits[number]) for split, numbers in shards.items() for number in numbers
    ]
    old = {int(shard.name): read_commit(index_uri(uri, shard.name)) for shard in kept}
    remove_strays(uri, {**old, **commits})
    write_common(uri, selection.common_captions)
    totals = total(infos, [*old.values(), *commits.values()], num_records + _num_records(base))
    if not totals["samples"]:
        raise MmflowError(
            f"{uri}: none of {totals['records']} records gave a sample: {totals['reasons']}; see quarantine/"
        )
    return {
        "fingerprint": fingerprint_of(infos),
        "shards": [asdict(info) for info in infos],
        "totals": totals,
        "settings": settings_of_build(settings),
        **({"grown_from": base.fingerprint} if base else {}),
    }


def _num_records(base: Dataset | None) -> int:
    return int(base.manifest["totals"]["records"]) if base else 0


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
        raise failure(error, f"{preparation.dataset}: preparing records", "what is prepared is kept") from error
    return pieces


def group_pieces(pieces: Mapping[str, int]) -> list[list[str]]:
    """The pieces, sorted, in groups of about equal numbers of records: a group is read by one task."""
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    num_groups = min(len(pieces), max(cpus, -(-sum(pieces.values()) // RECORDS_PER_GROUP)))
    return (
        [part.tolist() for part in np.array_split(np.array(sorted(pieces), dtype=object), num_groups)] if pieces else []
    )


def read_group(pieces: Sequence[str], rejected: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a group of pieces with their verdicts, and `pack`: the URI of each row's images."""
    tables = []
    for piece in pieces:
        rows = read_piece(piece, columns)
        pack = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows.num_rows, np.int32)), [pack_uri(piece)])
        tables.append(rows.append_column("pack", pack.cast(pa.string())))
    return with_verdicts(pa.concat_tables(tables), rejected)


def measure_group(pieces: Sequence[str], rejected: pa.Table) -> dict[str, Extent]:
    """What the rows that stay come to, by split."""
    columns = ("place", "split", "image_bytes", "frames", "reason", "detail")
    return extents_of_splits(read_group(pieces, rejected, columns))


def deal_group(
    pieces: Sequence[str], rejected: pa.Table, shards: Mapping[str, range], seed: int, num_buckets: int
) -> pa.Table | tuple[pa.Table, ...]:
    """The rows of a group, by bucket; a single one comes bare, as Ray wants it of a task of one result."""
    dealt = deal(read_group(pieces, rejected), shards, seed, num_buckets)
    return dealt[0] if num_buckets == 1 else dealt


def plan_shards(groups: Sequence[Sequence[str]], rejected: Any, settings: ShardConfig, first: int) -> dict[str, range]:
    """Each split's shards; where every record is rejected, one empty shard that their quarantine goes with."""
    measure = ray.remote(measure_group).options(retry_exceptions=[OSError])
    extents: dict[str, Extent] = {}
    try:
        measured = ray.get([measure.remote(group, rejected) for group in groups])
    except ray.exceptions.RayError as error:
        raise failure(error, "measuring the pieces", "what is prepared is kept") from error
    for found in measured:
        for split, extent in found.items():
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
    # A worker that dies is retried by itself; an OSError may be a passing one of the storage.
    write = ray.remote(write_shards).options(retry_exceptions=[OSError], scheduling_strategy="SPREAD")
    waiting = {}
    for numbers, parts in zip(numbers_of_bucket, buckets, strict=True):
        names = [shard_name(number) for number in numbers]
        waiting[write.remote(uri, names, numbers, settings, common_captions, *parts)] = numbers
    while waiting:
        done, _ = ray.wait(list(waiting))
        for reference in done:
            numbers = waiting.pop(reference)
            try:
                commits = ray.get(reference)
            except ray.exceptions.RayError as error:
                which = ", ".join(shard_name(number) for number in numbers)
                raise failure(error, f"{uri}: shard {which}", "finished shards are kept") from error
            yield from zip(numbers, commits, strict=True)


def failure(error: Exception, where: str, kept: str) -> MmflowError:
    """A task's failure as one line."""
    cause: Any = getattr(error, "cause", None)
    if isinstance(cause, MmflowError):
        return cause
    what = f"{type(cause).__name__}: {cause}" if cause is not None else " ".join(str(error).split())[:300]
    # Of what went wrong within Ray Data only the traceback's text is left, behind an exception of Ray Data's own.
    told = [line for line in ERROR_LINE.findall(str(error)) if not line.startswith(WRAPPERS)]
    if told and type(cause).__name__ in WRAPPERS:
        what = told[-1]
    return MmflowError(f"{where}: {what}; mend it and rerun: {kept}")


def shard_info(number: int, split: str, commit: ShardCommit) -> ShardInfo:
    """The manifest's line of a shard."""
    return ShardInfo(
        name=shard_name(number), split=split, samples=commit.samples, bytes=commit.bytes, checksum=commit.checksum
    )


def total(infos: Sequence[ShardInfo], commits: Iterable[ShardCommit], records: int) -> dict[str, Any]:
    """The manifest's totals. Raises MmflowError unless every record is a sample or in quarantine, once."""
    samples_of_split: Counter[str] = Counter()
    for info in infos:
        samples_of_split[info.split] += info.samples
    reasons: Counter[str] = Counter()
    for commit in commits:
        reasons.update(commit.reasons)
    samples, quarantined = samples_of_split.total(), reasons.total()
    if records != samples + quarantined:
        raise MmflowError(
            f"{records} records were read, but there are {samples} samples and {quarantined} in quarantine: "
            "this is a defect of mmflow, please report it"
        )
    return {
        "records": records,
        "samples": samples,
        "quarantined": quarantined,
        "bytes": sum(info.bytes for info in infos),
        "splits": dict(samples_of_split),
        "reasons": dict(sorted(reasons.items())),
    }


def remove_strays(uri: str, commits: Mapping[int, ShardCommit]) -> None:
    """Delete what this build did not make: staging files of a killed run, shards of an abandoned one."""
    names = {shard_name(number) for number in commits}
    quarantined = {shard_name(number) for number, commit in commits.items() if commit.quarantined}
    expected = {"shards": (names, ".tar"), "index": (names, ".parquet"), "quarantine": (quarantined, ".parquet")}
    for folder, (stems, extension) in expected.items():
        system, path = filesystem(join(uri, folder))
        files = {stem + extension for stem in stems}
        for found in system.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            if found.is_file and found.base_name not in files:
                with contextlib.suppress(FileNotFoundError):  # a killed run's last worker may still be renaming it
                    system.delete_file(found.path)
