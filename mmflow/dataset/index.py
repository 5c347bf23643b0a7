"""The index of a shard: where each member of each sample lies in the tar, so that training reads by position.

The file is also the shard's commit marker. Its metadata names the tar's checksum and the plan it was built from, and it
is published after the tar: a shard whose index carries the plan at hand is done, and a rerun leaves it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from mmflow.core.errors import CorruptArtifactError
from mmflow.core.storage import publish, read_bytes

MEMBERS = ("image", "txt", "json")
# Offsets count from the start of the tar, in bytes, and point at the body, behind the member's header. `width` and
# `height` are the stored image's, in pixels. `caption_tokens` estimates the longest caption of the sample. `frames` are
# a clip's members after the first, which is its image. The hashes of the pixels and the captions find duplicates of the
# sample later; they are null where nobody computed them (adopted tars). A text that an adopted tar lacks has 0 bytes,
# lies where the image lies, so that one read still spans the sample, and has the hash of nothing.
FRAME = pa.struct([("offset", pa.int64()), ("bytes", pa.int64()), ("xxh3", pa.uint64())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("row", pa.int64()),
        ("image_extension", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_tokens", pa.int32()),
        *((f"{member}_offset", pa.int64()) for member in MEMBERS),
        *((f"{member}_bytes", pa.int64()) for member in MEMBERS),
        *((f"{member}_xxh3", pa.uint64()) for member in MEMBERS),
        ("frames", pa.list_(FRAME)),
        ("pixel_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("caption_hashes", pa.list_(pa.uint64())),
        ("caption_characters", pa.int32()),
        ("languages", pa.list_(pa.string())),
        ("license", pa.string()),
    ]
)
COMMIT = b"mmflow.shard"


@dataclass(frozen=True, kw_only=True)
class ShardCommit:
    """What the index says of its shard as a whole."""

    plan: str  # hash of the records and settings that the shard is made from
    checksum: str  # xxh3_128 of the tar, hex
    bytes: int
    samples: int
    quarantined: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)


def write_index(uri: str, table: pa.Table, commit: ShardCommit) -> None:
    """Publish the index of a shard; the same table and commit give the same bytes."""
    metadata = {COMMIT: json.dumps(asdict(commit), sort_keys=True).encode()}
    write_parquet(uri, table.cast(SCHEMA).replace_schema_metadata(metadata))


def write_parquet(uri: str, table: pa.Table) -> None:
    """Publish a table whose bytes depend on its content alone.

    The writer's settings are spelled out because its defaults change between releases of pyarrow.
    """
    with publish(uri) as stream:
        pq.write_table(
            table,
            stream,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=True,
            write_statistics=True,
            row_group_size=1 << 20,
        )


def read_index(uri: str) -> pa.Table:
    """The index, of `SCHEMA`, one row a sample in the order of the tar.

    Raises MissingArtifactError where there is none, CorruptArtifactError where it is not one.
    """
    return read_index_and_commit(uri)[0]


def read_commit(uri: str) -> ShardCommit:
    """What the index says of its shard. Raises as `read_index`."""
    return read_index_and_commit(uri)[1]


def read_column(uri: str, name: str) -> pa.Array:
    """One column of a dataset's table: an index, or one of its small tables. Raises as `read_index`."""
    return _read(uri, [name])[name].combine_chunks()


def read_columns(uri: str, names: Sequence[str]) -> tuple[pa.Table, ShardCommit]:
    """Some columns of an index, in the order given, and what it says of its shard. Raises as `read_index`."""
    table = _read(uri, names)
    try:
        return table, ShardCommit(**json.loads((table.schema.metadata or {})[COMMIT]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(f"{uri}: not a shard's index ({error}); delete it and rebuild") from error


def _read(uri: str, names: Sequence[str]) -> pa.Table:
    data = read_bytes(uri)
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(columns=list(names), use_threads=False).select(names)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise CorruptArtifactError(
            f"{uri}: no table with {', '.join(names)} ({error}); delete it and rebuild the dataset"
        ) from error


def read_index_and_commit(uri: str) -> tuple[pa.Table, ShardCommit]:
    """Both of the above, from one read."""
    data = read_bytes(uri)
    try:
        # Not `pq.read_table`, which plans a whole dataset's scan for each of these small files.
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        commit = ShardCommit(**json.loads(table.schema.metadata[COMMIT]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(
            f"{uri}: not a shard's index ({error}); delete it and rebuild the dataset"
        ) from error
    if not table.schema.equals(SCHEMA):
        raise CorruptArtifactError(
            f"{uri}: columns {table.schema.names} instead of {SCHEMA.names}; rebuild the dataset"
        )
    return table, commit
