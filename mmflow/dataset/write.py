"""One shard from its rows: copy the images out of their packs, write, commit. Knows no Ray.

The order of publishing carries the promise: tar, then quarantine, then index. A process killed anywhere leaves either
a shard whose index vouches for the rest, or one that a rerun writes again with the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from mmflow.cleaning.captions import estimate_tokens
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.core.storage import filesystem, positioned_reader, publish
from mmflow.dataset.index import MEMBERS, SCHEMA, ShardCommit, read_commit, write_index, write_parquet
from mmflow.dataset.manifest import index_uri, quarantine_uri, tar_uri
from mmflow.dataset.tar import TarWriter

WRITE_VERSION = 1  # raise it when the same rows come to make other bytes
QUARANTINE = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "detail")])
OPEN_PACKS = 256  # file descriptors that one shard's writer keeps
# Where a row's images lie says nothing of what they are: `pixel_hash` and the sizes do.
PLACES = ("place", "pack", "image_offset", "shard")

Row = dict[str, Any]
Read = Callable[[str], Callable[[int, int], bytes]]  # a pack's URI → (size, offset) → bytes


def write_shards(
    uri: str,
    names: Sequence[str],
    numbers: Sequence[int],
    settings: str,
    common_captions: NDArray[np.uint64],
    *blocks: pa.Table,
) -> list[ShardCommit]:
    """Write the shards of a bucket, whose rows (`assign`) come in any number of blocks and in any order.

    `settings` stands for what the images were made with; captions whose hashes are common are left out.
    """
    table = pa.concat_tables(blocks).sort_by([("shard", "ascending"), ("hash", "ascending"), ("place", "ascending")])
    common = frozenset(common_captions.tolist())
    read: Read = lru_cache(maxsize=OPEN_PACKS)(positioned_reader)
    commits = []
    for name, number in zip(names, numbers, strict=True):
        rows = table.filter(pc.equal(table["shard"], number)).to_pylist()
        commits.append(write_shard(uri, name, [without_common(row, common) for row in rows], settings, read))
    return commits


def write_shard(uri: str, name: str, rows: list[Row], settings: str, read: Read) -> ShardCommit:
    """The shard's commit, written now unless it is there already, made from the same plan.

    `rows` are in the order of the shard, rejected ones among them.
    """
    plan = plan_of(rows, settings)
    if (found := committed(uri, name, plan)) is not None:
        return found
    entries: list[Row] = []
    rejected: list[Row] = []
    with publish(tar_uri(uri, name)) as stream:
        tar = TarWriter(stream)
        for row in rows:
            if row["reason"] is None:
                entries.append({"row": len(entries), **add_sample(tar, row, read(row["pack"]))})
            else:
                rejected.append({name: row[name] for name in QUARANTINE.names})
        checksum = tar.finish()
    if rejected:
        write_parquet(quarantine_uri(uri, name), pa.Table.from_pylist(rejected, QUARANTINE))
    commit = ShardCommit(
        plan=plan,
        checksum=checksum,
        bytes=tar.bytes,
        samples=len(entries),
        quarantined=len(rejected),
        reasons=dict(sorted(Counter(row["reason"] for row in rejected).items())),
    )
    write_index(index_uri(uri, name), pa.Table.from_pylist(entries, SCHEMA), commit)
    return commit


def without_common(row: Row, common: frozenset[int]) -> Row:
    """The row without the captions that too many images share. Where captions are required one is left, or the row
    would have been rejected."""
    if not common or row["reason"] is not None:
        return row
    kept = [
        (caption, code)
        for caption, code in zip(row["captions"], row["caption_hashes"], strict=True)
        if code not in common
    ]
    return {**row, "captions": [caption for caption, _ in kept], "caption_hashes": [code for _, code in kept]}


def plan_of(rows: list[Row], settings: str) -> str:
    """xxh3_128 (hex) of everything that the shard's bytes follow from: the same corpus elsewhere is the same plan."""
    digest = xxhash.xxh3_128(f"{WRITE_VERSION} {settings}".encode())
    for row in rows:
        kept = {name: value for name, value in row.items() if name not in PLACES}
        kept["frames"] = [frame["bytes"] for frame in row["frames"] or ()]
        digest.update(repr(kept).encode() + b"\n")  # strings, numbers and lists of them: a fifth of JSON's time
    return digest.hexdigest()


def committed(uri: str, name: str, plan: str) -> ShardCommit | None:
    """The commit of a shard that an earlier run finished from the same plan."""
    try:
        commit = read_commit(index_uri(uri, name))
    except (MissingArtifactError, CorruptArtifactError):
        return None
    system, path = filesystem(tar_uri(uri, name))
    return commit if commit.plan == plan and system.get_file_info(path).size == commit.bytes else None


def add_sample(tar: TarWriter, row: Row, read: Callable[[int, int], bytes]) -> Row:
    """Append a sample's members; return its line of the index, but for the row.

    Without a caption the text is empty. A clip's further frames stand behind the JSON as <key>.001.jpg and so on.
    """
    key, extension, captions = row["key"], row["image_extension"], row["captions"]
    metadata = json.loads(row["metadata"])
    entry: Row = {
        "key": key,
        "image_extension": extension,
        "width": row["width"],
        "height": row["height"],
        "caption_tokens": max((estimate_tokens(caption["text"]) for caption in captions), default=0),
        "caption_characters": max((len(caption["text"]) for caption in captions), default=0),
        "languages": [caption["language"] for caption in captions],
        "license": metadata.get("license") if isinstance(metadata.get("license"), str) else None,
        "pixel_hash": row["pixel_hash"],
        "perceptual_hash": row["perceptual_hash"],
        "caption_hashes": row["caption_hashes"],
    }
    # A record's metadata is canonical JSON already.
    json_body = f'{{"captions":{canonical_json(captions)},"metadata":{row["metadata"]}}}'.encode()
    text = captions[0]["text"] if captions else ""
    image = _whole(read, row["image_bytes"], row["image_offset"], key)
    frames = [_whole(read, frame["bytes"], frame["offset"], key) for frame in row["frames"]]
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


def _whole(read: Callable[[int, int], bytes], size: int, offset: int, key: str) -> bytes:
    body = read(size, offset)
    if len(body) != size:
        raise CorruptArtifactError(f"{key}: {len(body)} of {size} bytes of its image are left; delete prepared/, rerun")
    return body
