"""One shard from its records: load, clean, encode, write, commit. Knows no Ray, so that any process can write a shard.

The order of publishing carries the promise: tar, then quarantine, then index. A process killed anywhere leaves either
a shard whose index vouches for the rest, or one that a rerun writes again with the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from mmflow.artifacts import canonical_json, filesystem, join, local_path, publish, read_bytes
from mmflow.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.ingest.captions import clean_captions, estimate_tokens
from mmflow.ingest.config import CaptionConfig, ImageConfig
from mmflow.ingest.images import EncodedImage, prepare_image
from mmflow.ingest.reasons import Reason, Rejected
from mmflow.shards.dataset import index_uri, quarantine_uri, tar_uri
from mmflow.shards.index import MEMBERS, SCHEMA, ShardCommit, read_commit, write_index, write_parquet
from mmflow.shards.tar import TarWriter

PLAN_VERSION = 1  # raise it when the same records and settings come to make other bytes
QUARANTINE = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "detail")])
# What a file system says of a file that it will say again: these reject the record, any other error fails the task.
LASTING_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A clean record, as its members' bodies."""

    image: EncodedImage
    txt: bytes
    json: bytes
    caption_tokens: int


def write_shards(
    uri: str,
    names: Sequence[str],
    numbers: Sequence[int],
    image: ImageConfig,
    captions: CaptionConfig,
    *blocks: pa.Table,
) -> list[ShardCommit]:
    """Write the shards of a bucket, whose rows (`assign`) come in any number of blocks and in any order."""
    table = pa.concat_tables(blocks).sort_by([("shard", "ascending"), ("hash", "ascending"), ("place", "ascending")])
    commits = []
    for name, number in zip(names, numbers, strict=True):
        rows = table.filter(pc.equal(table["shard"], number)).to_pylist()
        commits.append(write_shard(uri, name, rows, image, captions))
    return commits


def write_shard(uri: str, name: str, rows: list[Row], image: ImageConfig, captions: CaptionConfig) -> ShardCommit:
    """The shard's commit, written now unless it is there already, made from the same plan.

    `rows` are in the order of the shard, claims of other splits among them.
    """
    rows = mark_repeated(rows)
    plan = plan_of(rows, image, captions)
    if (found := committed(uri, name, plan)) is not None:
        return found
    entries: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    with publish(tar_uri(uri, name)) as stream:
        tar = TarWriter(stream)
        for row, sample in prepare_samples(rows, image, captions):
            if isinstance(sample, Rejected):
                verdict = {"reason": str(sample.reason), "detail": sample.detail}
                rejected.append({"source": row["source"], "key": row["key"], **verdict})
            else:
                entries.append({"row": len(entries), **add_sample(tar, row["key"], sample)})
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


def mark_repeated(rows: list[Row]) -> list[Row]:
    """The shard's own rows: of a key that several records have, the first by source stays and the others are rejected.

    First by source whatever else is wrong with it, for only that is known to every shard that holds a claim.
    """
    first: dict[str, int] = {}
    for row in rows:
        if row["reason"] is None:
            first[row["key"]] = min(row["place"], first.get(row["key"], row["place"]))
    kept = []
    for row in rows:
        if row["claim"]:
            continue
        if row["reason"] is None and row["place"] != first[row["key"]]:
            row = {**row, "reason": str(Reason.key_repeated), "detail": "an earlier record has this key"}
        kept.append(row)
    return kept


def plan_of(rows: list[Row], image: ImageConfig, captions: CaptionConfig) -> str:
    """xxh3_128 (hex) of everything that the shard's bytes follow from, but for the image files' own bytes.

    Without `root`, a path of this machine: the same corpus elsewhere is the same plan.
    """
    settings = {"version": PLAN_VERSION, "image": image.model_dump(), "captions": captions.model_dump()}
    digest = xxhash.xxh3_128(canonical_json(settings).encode())
    for row in rows:
        digest.update(canonical_json({name: value for name, value in row.items() if name != "root"}).encode() + b"\n")
    return digest.hexdigest()


def committed(uri: str, name: str, plan: str) -> ShardCommit | None:
    """The commit of a shard that an earlier run finished from the same plan."""
    try:
        commit = read_commit(index_uri(uri, name))
    except (MissingArtifactError, CorruptArtifactError):
        return None
    system, path = filesystem(tar_uri(uri, name))
    return commit if commit.plan == plan and system.get_file_info(path).size == commit.bytes else None


def prepare_samples(
    rows: list[Row], image: ImageConfig, captions: CaptionConfig
) -> Iterator[tuple[Row, Sample | Rejected]]:
    """Each row with its sample, or with the reason why it has none."""
    for row in rows:
        try:
            yield row, prepare_sample(row, image, captions)
        except Rejected as rejected:
            yield row, rejected


def prepare_sample(row: Row, image: ImageConfig, captions: CaptionConfig) -> Sample:
    """The members of a record's sample. Raises Rejected."""
    if row["reason"] is not None:
        raise Rejected(Reason(row["reason"]), row["detail"])
    kept = clean_captions(
        row["captions"], min_characters=captions.min_characters, max_characters=captions.max_characters
    )
    encoded = prepare_image(
        load_image(row["root"], row["image"]),
        side=image.side,
        max_pixels=image.max_pixels,
        min_side=image.min_side,
        max_aspect=image.max_aspect,
        format=image.format,
        quality=image.quality,
    )
    return Sample(
        image=encoded,
        txt=kept[0]["text"].encode(),
        json=canonical_json({"captions": kept, "metadata": json.loads(row["metadata"])}).encode(),
        caption_tokens=max(estimate_tokens(caption["text"]) for caption in kept),
    )


def load_image(root: str, image: str) -> bytes:
    """The image file's bytes; `image` is a URI, or a path relative to `root`. Raises Rejected for what stays amiss."""
    uri = image if "://" in image or image.startswith(("/", "file:")) else join(root, image)
    try:
        path = local_path(uri)
        if path is None:
            return read_bytes(uri)
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would be waited on for ever
            raise Rejected(Reason.image_unreadable, f"{image}: not a file")
        return path.read_bytes()
    except (FileNotFoundError, MissingArtifactError) as error:
        raise Rejected(Reason.image_missing, f"{image}: no such file") from error
    except MisuseError as error:
        raise Rejected(Reason.image_unsupported, f"{image}: not a path, s3:// or gs://") from error
    except ValueError as error:  # a NUL within a path
        raise Rejected(Reason.image_unreadable, f"{image!r}: {error}") from error
    except OSError as error:
        if error.errno not in LASTING_ERRORS:
            raise
        raise Rejected(Reason.image_unreadable, f"{image}: {os.strerror(error.errno)}") from error


def add_sample(tar: TarWriter, key: str, sample: Sample) -> dict[str, Any]:
    """Append a sample's members; return its line of the index, but for the row."""
    entry: dict[str, Any] = {
        "key": key,
        "image_extension": sample.image.extension,
        "width": sample.image.width,
        "height": sample.image.height,
        "caption_tokens": sample.caption_tokens,
    }
    bodies = (sample.image.data, sample.txt, sample.json)
    for member, extension, body in zip(MEMBERS, (sample.image.extension, "txt", "json"), bodies, strict=True):
        entry[f"{member}_offset"] = tar.add(f"{key}.{extension}", body)
        entry[f"{member}_bytes"] = len(body)
        entry[f"{member}_xxh3"] = xxhash.xxh3_64_intdigest(body)
    return entry
