"""Records to a committed dataset, on Ray: read once, deal the rows out by hash, write each shard as a task of its own.

Rows are exchanged by plain Ray tasks and not by `groupby().map_groups()`: on two CPUs that took 9 to 20 s for 4,500
rows where this takes under one; it reports nothing until a block of several shards is through; and a task retried here
is exactly one bucket of shards, of which those that were finished are recognised by their plan.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import ray
import ray.data
import ray.exceptions
from pyarrow import fs

from mmflow.artifacts import file_sha256, filesystem, join
from mmflow.errors import MmflowError
from mmflow.ingest.config import CaptionConfig, ImageConfig, SourceConfig
from mmflow.ingest.sources import read_records, source_names
from mmflow.shards.dataset import ShardInfo, fingerprint_of, shard_name
from mmflow.shards.exchange import bucket_of, count_splits, deal, shards_of_splits
from mmflow.shards.index import ShardCommit
from mmflow.shards.write import write_shards

# A bucket is one task. The exchange makes an object for each block in each bucket, so their number is bounded; it is
# also the bound on how much of the metadata one worker holds: a 512th.
MAX_BUCKETS = 512


def build_dataset(
    uri: str,
    *,
    sources: Sequence[SourceConfig],
    image: ImageConfig,
    captions: CaptionConfig,
    samples_per_shard: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Build the shards, indexes and quarantine of the dataset at `uri`; return the manifest's fields, uncommitted.

    The same records and settings give the same bytes, however many workers, and however often a killed build is rerun
    in the same place. `progress(done, total)` counts shards. Raises MmflowError where a shard cannot be written, where
    no sample is left, or where the totals do not balance.
    """
    blocks = read_blocks(sources)
    num_records = count_records(blocks)
    num_rejected = num_records.pop(None, 0)
    shards = shards_of_splits({split: number for split, number in num_records.items() if split}, samples_per_shard)
    if not shards:
        raise MmflowError(f"{uri}: none of {num_rejected} records can be read; is this JSONL of records?")
    commits: dict[int, ShardCommit] = {}
    for number, commit in write_all(uri, blocks, shards, seed, image, captions):
        commits[number] = commit
        progress(len(commits), max(numbers.stop for numbers in shards.values()))
    remove_strays(uri, commits)
    infos = [shard_info(number, split, commits[number]) for split, numbers in shards.items() for number in numbers]
    totals = total(infos, commits.values(), records=sum(num_records.values()) + num_rejected)
    if not totals["samples"]:
        raise MmflowError(
            f"{uri}: none of {totals['records']} records gave a sample: {totals['reasons']}; see quarantine/"
        )
    return {
        "fingerprint": fingerprint_of(infos),
        "shards": [asdict(info) for info in infos],
        "totals": totals,
        "sources": fingerprint_sources(sources),
        "settings": {
            "image": image.model_dump(),
            "captions": captions.model_dump(),
            "samples_per_shard": samples_per_shard,
            "seed": seed,
        },
    }


def fingerprint_sources(sources: Sequence[SourceConfig]) -> list[dict[str, Any]]:
    """Name and sha256 of each source, without a path of this machine. The images are in the shards' checksums."""
    names = source_names([source.uri for source in sources])
    return [{"name": name, "sha256": file_sha256(source.uri)} for name, source in zip(names, sources, strict=True)]


def read_blocks(sources: Sequence[SourceConfig]) -> list[Any]:
    """References to the blocks of records, read once and kept in Ray's object store, which spills to disk."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its plan, its bars and why there are none: `progress` is all that callers show
    try:
        records = read_records(sources)
        records.context.enable_progress_bars = False
        return list(records.to_arrow_refs())
    finally:
        logger.setLevel(level)


def count_records(blocks: Sequence[Any]) -> Counter[str | None]:
    """The number of good records of each split, and of those rejected when read under None."""
    count = ray.remote(count_splits)
    counts: Counter[str | None] = Counter()
    for found in ray.get([count.remote(block) for block in blocks]):
        counts.update(found)
    return counts


def write_all(
    uri: str,
    blocks: Sequence[Any],
    shards: Mapping[str, range],
    seed: int,
    image: ImageConfig,
    captions: CaptionConfig,
) -> Iterator[tuple[int, ShardCommit]]:
    """Every shard's number and commit, as they complete."""
    num_shards = max(numbers.stop for numbers in shards.values())
    num_buckets = min(num_shards, MAX_BUCKETS)
    deal_block = ray.remote(deal).options(num_returns=num_buckets)
    dealt = [deal_block.remote(block, shards, seed, num_buckets) for block in blocks]
    buckets = list(zip(*dealt, strict=True)) if num_buckets > 1 else [tuple(dealt)]
    bucket_of_shard = bucket_of(np.arange(num_shards), num_shards, num_buckets).tolist()
    numbers_of_bucket = [[number for number, _ in run] for _, run in groupby(enumerate(bucket_of_shard), itemgetter(1))]
    # A worker that dies is retried by itself; an OSError may be a passing one of the storage.
    write = ray.remote(write_shards).options(retry_exceptions=[OSError], scheduling_strategy="SPREAD")
    waiting = {}
    for numbers, parts in zip(numbers_of_bucket, buckets, strict=True):
        names = [shard_name(number) for number in numbers]
        waiting[write.remote(uri, names, numbers, image, captions, *parts)] = numbers
    while waiting:
        done, _ = ray.wait(list(waiting))
        for reference in done:
            numbers = waiting.pop(reference)
            yield from zip(numbers, result(uri, numbers, reference), strict=True)


def result(uri: str, numbers: Sequence[int], reference: Any) -> list[ShardCommit]:
    """What a task returned, or its failure as one line that names its shards."""
    names = ", ".join(shard_name(number) for number in numbers)
    try:
        commits: list[ShardCommit] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MmflowError):
            raise error.cause from None
        what = f"{type(error.cause).__name__}: {error.cause}"
        raise MmflowError(f"{uri}: shard {names}: {what}; mend it and rerun: finished shards are kept") from error
    except ray.exceptions.RayError as error:
        what = " ".join(str(error).split())[:300]
        raise MmflowError(f"{uri}: shard {names}: {what}; rerun: finished shards are kept") from error
    return commits


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
