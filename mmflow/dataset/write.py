"""Rows to shards: which shard a row goes to, and the writing of one shard. Knows nothing about Ray.

A row's shard is a function of its key alone: a global shuffle without a global sort. The order of a dataset is the
order of its keys' hashes under a seed. The hashes of each split are cut into equal ranges, one per shard; within a
shard, samples are ordered by hash. So the same records make the same shards, however they were spread over files,
blocks and workers.

A shard is published as tar, then quarantine, then index. A process killed at any point leaves either a shard with an
index that vouches for the rest, or one that a rerun writes again with the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from mmflow.cleaning.captions import Caption, estimate_tokens
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.core.storage import filesystem, positioned_reader, publish
from mmflow.dataset.format import (
    MEMBERS,
    QUARANTINE,
    SCHEMA,
    ShardCommit,
    index_uri,
    quarantine_uri,
    read_index,
    shard_name,
    tar_uri,
    write_index,
    write_parquet,
)
from mmflow.dataset.tar import TarWriter

WRITE_VERSION = 1  # increase it when the same rows give other bytes
OTHER_BYTES = 5 * 512  # of a sample beside its images: three headers, a caption and JSON of at most a block each
OPEN_PACKS = 256  # file descriptors that one shard's writer keeps
# Where a row's images are says nothing about what they are: `pixel_hash` and the sizes do.
PLACES = ("place", "pack", "image_offset", "shard")

Row = dict[str, Any]
Read = Callable[[int, int], bytes]  # (size, offset) → bytes


# --- rows to shards ---------------------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """A number of samples and their size."""

    samples: int
    bytes: int


def with_verdicts(rows: pa.Table, rejected: pa.Table) -> pa.Table:
    """The rows, with those rejected that `rejected` (place, reason, detail; sorted by place) lists."""
    places, row_places = rejected["place"].to_numpy(), rows["place"].to_numpy()
    position = np.searchsorted(places, row_places)
    inside = position < len(places)
    hit = np.zeros(rows.num_rows, bool)
    hit[inside] = places[position[inside]] == row_places[inside]
    take = pa.array(position, mask=~hit)
    for name in ("reason", "detail"):
        verdict = rejected[name].combine_chunks().take(take)
        column = rows.schema.get_field_index(name)
        rows = rows.set_column(column, rows.schema.field(column), pc.coalesce(rows[name], verdict))
    return rows


def extents_of_splits(rows: pa.Table) -> dict[str, Extent]:
    """The extent of each split's good rows."""
    good = rows.filter(pc.is_null(rows["reason"]))
    frames = good["frames"].combine_chunks()
    parents = frames.value_parent_indices().to_numpy()
    size = good["image_bytes"].to_numpy().astype(np.int64) + OTHER_BYTES
    np.add.at(size, parents, frames.flatten().field("bytes").to_numpy(zero_copy_only=False) + 512)
    split = np.array(good["split"].to_pylist(), dtype=str)
    return {str(name): Extent(int((split == name).sum()), int(size[split == name].sum())) for name in np.unique(split)}


def shards_of_splits(
    extents: Mapping[str, Extent], samples_per_shard: int, bytes_per_shard: int, first: int = 0
) -> dict[str, range]:
    """The numbers of each split's shards, counted from `first` over the splits sorted by name."""
    shards = {}
    for split in sorted(extents):
        extent = extents[split]
        num_shards = max(-(-extent.samples // samples_per_shard), -(-extent.bytes // bytes_per_shard))
        shards[split] = range(first, first + num_shards)
        first += num_shards
    return shards


def span(shards: Mapping[str, range]) -> range:
    """The numbers of all splits' shards, which are consecutive."""
    return range(min(numbers.start for numbers in shards.values()), max(numbers.stop for numbers in shards.values()))


def assign(rows: pa.Table, shards: Mapping[str, range], seed: int) -> pa.Table:
    """The rows with columns `shard` and `hash`. Rejected rows are spread over all shards by a hash of their source."""
    rejected = rows.filter(pc.is_valid(rows["reason"]))
    hashes = _hashes(rejected["source"], seed)
    parts = [_assigned(rejected, hashes % np.uint64(len(span(shards))), span(shards).start, hashes)]
    for split, numbers in shards.items():
        own = rows.filter(pc.and_(pc.is_null(rows["reason"]), pc.equal(rows["split"], split)))
        hashes = _hashes(own["key"], seed)
        # The upper half of the hash times the number of ranges, over 2^32: the range it falls into, in whole numbers.
        within = (hashes >> np.uint64(32)) * np.uint64(len(numbers)) >> np.uint64(32)
        parts.append(_assigned(own, within, numbers.start, hashes))
    return pa.concat_tables(parts)


def _hashes(texts: pa.ChunkedArray, seed: int) -> NDArray[np.uint64]:
    return np.array([xxhash.xxh3_64_intdigest(text.encode(), seed) for text in texts.to_pylist()], np.uint64)


def _assigned(rows: pa.Table, within: NDArray[np.uint64], first: int, hashes: NDArray[np.uint64]) -> pa.Table:
    rows = rows.append_column("shard", pa.array(within.astype(np.int64) + first, pa.int64()))
    return rows.append_column("hash", pa.array(hashes, pa.uint64()))


def deal(rows: pa.Table, shards: Mapping[str, range], seed: int, num_buckets: int) -> tuple[pa.Table, ...]:
    """The assigned rows, split into buckets of neighbouring shards."""
    assigned = assign(rows, shards, seed)
    bucket = bucket_of(assigned["shard"].to_numpy() - span(shards).start, len(span(shards)), num_buckets)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    return tuple(assigned.take(order[start:end]) for start, end in pairwise(ends))


def bucket_of(shard: NDArray[np.int64], num_shards: int, num_buckets: int) -> NDArray[np.int64]:
    """The bucket of each shard, counted from 0, (shards,): equal runs of shards."""
    return shard * num_buckets // num_shards


# --- writing ----------------------------------------------------------------------------------------------------------


def write_shards(
    uri: str, numbers: Sequence[int], settings: str, common_captions: NDArray[np.uint64], *blocks: pa.Table
) -> list[ShardCommit]:
    """Write the shards of a bucket from its assigned rows, in any number of blocks and in any order.

    `settings` stands for how the images were made. Captions with a common hash are left out.
    """
    table = pa.concat_tables(blocks).sort_by([("shard", "ascending"), ("hash", "ascending"), ("place", "ascending")])
    common = frozenset(common_captions.tolist())
    open_pack = lru_cache(maxsize=OPEN_PACKS)(positioned_reader)
    commits = []
    for number in numbers:
        rows = table.filter(pc.equal(table["shard"], number)).to_pylist()
        rows = [without_common(row, common) for row in rows]
        commits.append(write_shard(uri, shard_name(number), rows, settings, open_pack))
    return commits


def write_shard(uri: str, name: str, rows: list[Row], settings: str, open_pack: Callable[[str], Read]) -> ShardCommit:
    """The shard's commit; the shard is written unless it already exists, made from the same plan.

    `rows` are in the order of the shard, including rejected ones.
    """
    plan = plan_of(rows, settings)
    if (commit := committed(uri, name, plan)) is not None:
        return commit
    entries: list[Row] = []
    rejected: list[Row] = []
    with publish(tar_uri(uri, name)) as stream:
        tar = TarWriter(stream)
        for row in rows:
            if row["reason"] is None:
                entries.append({"row": len(entries), **add_sample(tar, row, open_pack(row["pack"]))})
            else:
                rejected.append({name: row[name] for name in QUARANTINE.names})
        checksum = tar.finish()
    return commit_shard(uri, name, entries, rejected, plan=plan, checksum=checksum, num_bytes=tar.bytes)


def commit_shard(
    uri: str, name: str, entries: list[Row], rejected: list[Row], *, plan: str, checksum: str, num_bytes: int
) -> ShardCommit:
    """Publish the quarantine and the index of a shard that has its tar."""
    if rejected:
        write_parquet(quarantine_uri(uri, name), pa.Table.from_pylist(rejected, QUARANTINE))
    commit = ShardCommit(
        plan=plan,
        checksum=checksum,
        bytes=num_bytes,
        samples=len(entries),
        quarantined=len(rejected),
        reasons=dict(sorted(Counter(row["reason"] for row in rejected).items())),
    )
    write_index(index_uri(uri, name), pa.Table.from_pylist(entries, SCHEMA), commit)
    return commit


def without_common(row: Row, common: frozenset[int]) -> Row:
    """The row without its common captions. If captions are required, the row has another one, or it was rejected."""
    if not common or row["reason"] is not None:
        return row
    pairs = zip(row["captions"], row["caption_hashes"], strict=True)
    kept = [(caption, code) for caption, code in pairs if code not in common]
    return {**row, "captions": [caption for caption, _ in kept], "caption_hashes": [code for _, code in kept]}


def plan_of(rows: list[Row], settings: str) -> str:
    """xxh3_128 (hex) of everything that decides about the shard's bytes. It is the same for a corpus that moved."""
    digest = xxhash.xxh3_128(f"{WRITE_VERSION} {settings}".encode())
    for row in rows:
        kept = {name: value for name, value in row.items() if name not in PLACES}
        kept["frames"] = [frame["bytes"] for frame in row["frames"] or ()]
        digest.update(repr(kept).encode() + b"\n")  # strings, numbers and lists of them: a fifth of JSON's time
    return digest.hexdigest()


def committed(uri: str, name: str, *plans: str) -> ShardCommit | None:
    """The commit of a shard that an earlier run finished from one of these plans."""
    try:
        commit = read_index(index_uri(uri, name))[1]
    except (MissingArtifactError, CorruptArtifactError):
        return None
    system, path = filesystem(tar_uri(uri, name))
    return commit if commit.plan in plans and system.get_file_info(path).size == commit.bytes else None


def add_sample(tar: TarWriter, row: Row, read: Read) -> Row:
    """Append a sample's members; return its index entry without the row number.

    Without a caption the text is empty. A clip's further frames come after the JSON, as <key>.001.jpg and so on.
    """
    key, extension, captions = row["key"], row["image_extension"], row["captions"]
    metadata = json.loads(row["metadata"])
    entry: Row = {
        "key": key,
        "image_extension": extension,
        "width": row["width"],
        "height": row["height"],
        **describe_captions(captions),
        "license": metadata.get("license") if isinstance(metadata.get("license"), str) else None,
        "pixel_hash": row["pixel_hash"],
        "perceptual_hash": row["perceptual_hash"],
        "caption_hashes": row["caption_hashes"],
    }
    # A record's metadata is canonical JSON already.
    json_body = f'{{"captions":{canonical_json(captions)},"metadata":{row["metadata"]}}}'.encode()
    text = captions[0]["text"] if captions else ""
    image = _read_whole(read, row["image_bytes"], row["image_offset"], key)
    frames = [_read_whole(read, frame["bytes"], frame["offset"], key) for frame in row["frames"]]
    members = [(f"{key}.{extension}", image), (f"{key}.txt", text.encode()), (f"{key}.json", json_body)]
    members += [(f"{key}.{number:03d}.{extension}", frame) for number, frame in enumerate(frames, 1)]
    places = [
        (offset, len(body), xxhash.xxh3_64_intdigest(body))
        for offset, (_, body) in zip(tar.add(members), members, strict=True)
    ]
    for member, place in zip(MEMBERS, places, strict=False):
        entry[f"{member}_offset"], entry[f"{member}_bytes"], entry[f"{member}_xxh3"] = place
    entry["frames"] = [dict(zip(("offset", "bytes", "xxh3"), place, strict=True)) for place in places[len(MEMBERS) :]]
    return entry


def describe_captions(captions: Sequence[Caption]) -> Row:
    """The index's columns about captions."""
    return {
        "caption_tokens": max((estimate_tokens(caption["text"]) for caption in captions), default=0),
        "caption_characters": max((len(caption["text"]) for caption in captions), default=0),
        "languages": [caption["language"] for caption in captions],
    }


def _read_whole(read: Read, size: int, offset: int, key: str) -> bytes:
    body = read(size, offset)
    if len(body) != size:
        raise CorruptArtifactError(
            f"{key}: only {len(body)} of {size} bytes of its image exist; delete prepared/, rerun"
        )
    return body
