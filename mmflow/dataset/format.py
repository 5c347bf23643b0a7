"""The format of a dataset on disk: its manifest, where its files are, and the index of each shard.

The index says where each member of each sample is in the tar, so that training reads by position. It is also the
shard's commit marker: its metadata has the tar's checksum and the plan that the tar was made from, and it is published
after the tar. A rerun leaves a shard alone if its index has the current plan.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import CorruptArtifactError, MisuseError
from mmflow.core.storage import filesystem, join, publish, read_bytes

KIND = "dataset"
MEMBERS = ("image", "txt", "json")
# Offsets are bytes from the start of the tar to the body, behind the member's header. `width` and `height` are the
# stored image's, in pixels. `caption_tokens` estimates the longest caption. `frames` are a clip's members after the
# first, which is its image. The hashes of pixels and captions find duplicates later; they are null in adopted tars. A
# text that an adopted tar lacks has 0 bytes, the hash of nothing, and the image's offset, so that one read spans the
# sample.
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
        ("frames", pa.list_(pa.struct([("offset", pa.int64()), ("bytes", pa.int64()), ("xxh3", pa.uint64())]))),
        ("pixel_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("caption_hashes", pa.list_(pa.uint64())),
        ("caption_characters", pa.int32()),
        ("languages", pa.list_(pa.string())),
        ("license", pa.string()),
    ]
)
QUARANTINE = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "detail")])
COMMIT = b"mmflow.shard"


# --- the manifest -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One entry of the manifest. A shard in which every record was rejected has no samples and an empty tar."""

    name: str  # "00000": the name of the tar and of the index, without the extension
    split: str
    samples: int
    bytes: int
    checksum: str  # xxh3_128 of the tar, hex


@dataclass(frozen=True)
class CommittedShards:
    """The shards of a committed dataset. Two are equal if they have the same URI."""

    uri: str
    manifest: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the shards' checksums. Caches, scores and lineage refer to it."""
        return str(self.manifest["fingerprint"])

    @property
    def adopted(self) -> bool:
        """Whether others wrote the tars: keys and JSON are as they are, and the index does not list every member."""
        return bool(self.manifest.get("adopted", False))

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, sorted."""
        return tuple(sorted(self._shards_of_split))

    @cached_property
    def _shards_of_split(self) -> dict[str, tuple[ShardInfo, ...]]:
        shards = [ShardInfo(**shard) for shard in self.manifest["shards"]]
        splits = {shard.split for shard in shards}
        return {split: tuple(shard for shard in shards if shard.split == split) for split in splits}

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of a split, in the order of their names. Raises MisuseError if there is no such split."""
        if split not in self._shards_of_split:
            raise MisuseError(f"{self.uri}: no split {split!r}; there are {', '.join(self.splits)}")
        return self._shards_of_split[split]

    def samples(self, split: str) -> int:
        """The number of samples of a split."""
        return sum(shard.samples for shard in self.shards(split))

    def tar_uri(self, shard: ShardInfo) -> str:
        """The URI of the shard's tar."""
        return tar_uri(self.uri, shard.name)

    def index(self, shard: ShardInfo) -> pa.Table:
        """The shard's index, read from storage at each call."""
        return read_index(index_uri(self.uri, shard.name))[0]


def fingerprint_of(shards: Sequence[ShardInfo]) -> str:
    """sha256 (hex) over each shard's split and checksum, in order: the same bytes in another split are other data."""
    return content_hash([[shard.split, shard.checksum] for shard in shards])


def totals_of(shards: Iterable[ShardInfo], reasons: Mapping[str, int]) -> dict[str, Any]:
    """The manifest's totals: every record is a sample or, for one of the `reasons` (→ count), in quarantine."""
    splits, num_bytes = Counter[str](), 0
    for shard in shards:
        splits[shard.split] += shard.samples
        num_bytes += shard.bytes
    samples, quarantined = splits.total(), sum(reasons.values())
    return {
        "records": samples + quarantined,
        "samples": samples,
        "quarantined": quarantined,
        "bytes": num_bytes,
        "splits": dict(splits),
        "reasons": dict(sorted(reasons.items())),
    }


# --- the files --------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """At least five digits, as brace ranges such as {00000..00041} expect."""
    return f"{number:05d}"


def tar_uri(uri: str, name: str) -> str:
    """<dataset>/shards/<name>.tar"""
    return join(uri, "shards", f"{name}.tar")


def index_uri(uri: str, name: str) -> str:
    """<dataset>/index/<name>.parquet"""
    return join(uri, "index", f"{name}.parquet")


def quarantine_uri(uri: str, name: str) -> str:
    """<dataset>/quarantine/<name>.parquet"""
    return join(uri, "quarantine", f"{name}.parquet")


def list_folder(uri: str, folder: str) -> dict[str, int]:
    """The files of a folder of the dataset, sorted by name, and their bytes."""
    system, path = filesystem(join(uri, folder))
    entries = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {entry.base_name: entry.size for entry in sorted(entries, key=lambda e: e.base_name) if entry.is_file}


def quarantine_files(uri: str) -> list[str]:
    """The URIs of the tables of rejected records, sorted by name."""
    return [join(uri, "quarantine", name) for name in list_folder(uri, "quarantine") if not name.startswith(".")]


def remove_strays(uri: str, names: Collection[str], quarantined: Collection[str]) -> None:
    """Delete all but the shards and quarantine tables with these names: leftovers of killed and abandoned builds."""
    expected = {"shards": (names, ".tar"), "index": (names, ".parquet"), "quarantine": (quarantined, ".parquet")}
    for folder, (stems, extension) in expected.items():
        system, path = filesystem(join(uri, folder))
        for name in list_folder(uri, folder).keys() - {stem + extension for stem in stems}:
            with contextlib.suppress(FileNotFoundError):  # a killed run's last worker may still be renaming it
                system.delete_file(f"{path}/{name}")


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardCommit:
    """What the index says about its shard as a whole."""

    plan: str  # hash of the records and settings that the shard is made from
    checksum: str  # xxh3_128 of the tar, hex
    bytes: int
    samples: int
    quarantined: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)

    def info(self, name: str, split: str) -> ShardInfo:
        """The shard's entry of the manifest."""
        return ShardInfo(name=name, split=split, samples=self.samples, bytes=self.bytes, checksum=self.checksum)


def write_index(uri: str, table: pa.Table, commit: ShardCommit) -> None:
    """Publish the index of a shard. The same table and commit give the same bytes."""
    metadata = {COMMIT: json.dumps(asdict(commit), sort_keys=True).encode()}
    write_parquet(uri, table.cast(SCHEMA).replace_schema_metadata(metadata))


def write_parquet(uri: str, table: pa.Table) -> None:
    """Publish a table with bytes that depend on its content alone.

    The writer's settings are explicit because its defaults change between releases of pyarrow.
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


def read_index(uri: str) -> tuple[pa.Table, ShardCommit]:
    """The index, one row of `SCHEMA` per sample in the order of the tar, and what it says about its shard.

    Raises MissingArtifactError if there is none, CorruptArtifactError if it is not an index.
    """
    table = _read(uri, None)
    commit = _commit(uri, table)
    if not table.schema.equals(SCHEMA):
        raise CorruptArtifactError(
            f"{uri}: columns {table.schema.names} instead of {SCHEMA.names}; rebuild the dataset"
        )
    return table, commit


def read_columns(uri: str, names: Sequence[str]) -> tuple[pa.Table, ShardCommit]:
    """Some columns of an index, in the order given, and what it says about its shard. Raises as `read_index`."""
    table = _read(uri, names)
    return table, _commit(uri, table)


def read_column(uri: str, name: str) -> pa.Array:
    """One column of an index or of another table of a dataset. Raises as `read_index`."""
    return _read(uri, [name])[name].combine_chunks()


def _read(uri: str, names: Sequence[str] | None) -> pa.Table:
    data = read_bytes(uri)
    try:
        # Not `pq.read_table`, which plans a whole dataset's scan for each of these small files.
        table = pq.ParquetFile(pa.BufferReader(data)).read(columns=names and list(names), use_threads=False)
        return table if names is None else table.select(names)
    except (pa.ArrowException, OSError, KeyError) as error:
        what = "not a shard's index" if names is None else f"no table with {', '.join(names)}"
        raise CorruptArtifactError(f"{uri}: {what} ({error}); delete it and rebuild the dataset") from error


def _commit(uri: str, table: pa.Table) -> ShardCommit:
    try:
        return ShardCommit(**json.loads((table.schema.metadata or {})[COMMIT]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(
            f"{uri}: not a shard's index ({error}); delete it and rebuild the dataset"
        ) from error
