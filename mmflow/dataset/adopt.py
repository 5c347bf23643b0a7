"""Tars written by others, as a dataset: an index and a manifest beside them, with not a byte of them changed.

Each tar is read once, in order, and linked or copied under our name. The samples are webdataset's: neighbours with one
key, which ends at the first dot of the base name. What cannot be trained on stays in its tar and is listed in
quarantine. Damaged tars, which would silently lose samples, are refused.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

from mmflow.core.artifacts import MANIFEST, Artifact, canonical_json, commit, content_hash, exclusive, read_artifact
from mmflow.core.errors import CorruptArtifactError, MisuseError, MmflowError
from mmflow.core.listing import IMAGE_EXTENSIONS, find
from mmflow.core.storage import exists, filesystem, join, local_path, write_json
from mmflow.dataset.format import (
    KIND,
    MEMBERS,
    QUARANTINE,
    SCHEMA,
    ShardCommit,
    fingerprint_of,
    index_uri,
    quarantine_uri,
    read_column,
    read_index,
    remove_strays,
    shard_name,
    tar_uri,
    totals_of,
    write_index,
    write_parquet,
)
from mmflow.dataset.grow import bring, on_this_machine
from mmflow.dataset.reader import read_texts
from mmflow.dataset.verify import Repeat, repeated_keys
from mmflow.dataset.write import Row, commit_shard, committed, describe_captions
from mmflow.imaging.header import probe
from mmflow.sources.fields import SIDECARS, TEXTS
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import SPLIT
from mmflow.sources.webdataset import Damage, Member, read_members, split_name

ADOPT_VERSION = 1  # increase it when the same tars give another index
READ_BYTES = 1 << 20
DAMAGED = "damaged"  # the quarantine's table of tars that were left out
UNDER_WAY = "adopting.json"  # marks a directory without a manifest as an unfinished adoption
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}  # of other formats, the name in lower case
MAX_KEY_BYTES = 1000

Group = list[tuple[str, Member]]


@dataclass(frozen=True, kw_only=True)
class Tar:
    """One of the tars to adopt. Size and `modified` (ns) tell whether it is still the one that was scanned."""

    uri: str
    name: str
    size: int
    modified: int


def adopt(
    uri: str,
    tars: Sequence[str],
    *,
    split: str = "train",
    license: str | None = None,
    captions_required: bool = True,
    skip_damaged: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Artifact:
    """Commit the dataset at `uri` from tars that others wrote (paths or URIs, globs and brace ranges), each a shard.

    If it was committed from the same tars before, it is returned at once; a killed adoption is continued. `license` is
    for records that name none. Without `captions_required`, pictures without captions are samples too. Raises
    MisuseError for missing tars or another dataset at `uri`, CorruptArtifactError for a damaged tar unless
    `skip_damaged`. Memory: a shard's index, and 8 bytes per key.
    """
    if not SPLIT.fullmatch(split):
        raise MisuseError(f"split {split!r}: use lower-case letters, digits, - and _, at most 40")
    listed = list_tars(tars)
    settings = {
        "split": split,
        "license": license,
        "skip_damaged": skip_damaged,
        "captions_required": captions_required,
    }
    asked = {"version": ADOPT_VERSION, **settings, "tars": [(tar.name, tar.size) for tar in listed]}
    identity = content_hash(asked)[:16]
    with exclusive(uri):
        if exists(join(uri, MANIFEST)):
            artifact = read_artifact(uri, KIND)
            if artifact.manifest.get("identity") != identity:
                raise MisuseError(f"{uri}: a dataset of other tars or settings is here; name a new directory")
            return artifact
        check_directory(uri, listed)
        write_json(join(uri, UNDER_WAY), asked)
        tar_of_name: dict[str, Tar] = {}
        damaged: list[Row] = []
        for done, tar in enumerate(listed):
            progress(done, len(listed))
            name = shard_name(len(tar_of_name))
            try:
                adopt_tar(uri, name, tar, license, captions_required, identity)
            except CorruptArtifactError as error:
                if not skip_damaged:
                    raise
                detail = str(error).removeprefix(f"{tar.uri}: ").partition(";")[0]
                damaged.append({"source": tar.name, "reason": str(Reason.source_damaged), "detail": detail})
                continue
            tar_of_name[name] = tar
        if damaged:
            write_parquet(quarantine_uri(uri, DAMAGED), pa.Table.from_pylist(damaged, QUARANTINE))
        commits = drop_repeats(uri, tar_of_name, identity)
        quarantined = [name for name, shard in commits.items() if shard.quarantined]
        remove_strays(uri, commits, [*quarantined, *[DAMAGED] * bool(damaged)])
        infos = [shard.info(name, split) for name, shard in commits.items()]
        reasons = Counter({str(Reason.source_damaged): len(damaged)} if damaged else {})
        for shard in commits.values():
            reasons.update(shard.reasons)
        totals = totals_of(infos, reasons)
        if not totals["samples"]:
            raise MmflowError(f"{uri}: no sample in {len(infos)} tars: {dict(reasons)}; see quarantine/")
        fields = {
            "identity": identity,
            "inputs": {},
            "adopted": True,
            "fingerprint": fingerprint_of(infos),
            "shards": [asdict(info) for info in infos],
            "totals": totals,
            "sources": [
                {"name": tar.name, "shard": name, "xxh3_128": commits[name].checksum}
                for name, tar in tar_of_name.items()
            ],
            "settings": settings,
        }
        artifact = commit(uri, KIND, fields)
        system, path = filesystem(join(uri, UNDER_WAY))
        system.delete_file(path)
        return artifact


def list_tars(patterns: Sequence[str]) -> list[Tar]:
    """The tars in the order given, each once. Raises MisuseError for what is missing or not a file."""
    tars: dict[str, Tar] = {}
    for pattern in patterns:
        for place in find(pattern):
            system, path = filesystem(place.uri)
            info = system.get_file_info(path)
            if place.is_directory or not info.is_file:
                raise MisuseError(f"{place.uri}: not a file; name tars, such as {place.uri.rstrip('/')}/*.tar")
            tars[place.uri] = Tar(
                uri=place.uri, name=Path(path).name, size=info.size, modified=info.mtime_ns if info.mtime else 0
            )
    if not tars:
        raise MisuseError("no tars are named")
    return list(tars.values())


def check_directory(uri: str, tars: Sequence[Tar]) -> None:
    """Raises MisuseError if the directory has others' files, or the tars themselves, which would be overwritten."""
    system, path = filesystem(uri)
    inside = [tar.uri for tar in tars if filesystem(tar.uri)[1].startswith(path.rstrip("/") + "/")]
    if inside:
        raise MisuseError(f"{inside[0]}: lies in {uri} itself; name a new directory, which will hold links to the tars")
    files = {info.base_name for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True))}
    if UNDER_WAY not in files and files - {".lock"}:
        raise MisuseError(f"{uri}: not empty ({min(files - {'.lock'})}); name a new directory")


def adopt_tar(uri: str, name: str, tar: Tar, license: str | None, captions_required: bool, identity: str) -> None:
    """Index one tar as a shard, unless an earlier run did. Raises CorruptArtifactError, naming the byte.

    An index that has lost its repeats already is only valid for the same adoption: among other tars, others repeat.
    """
    plan = content_hash([ADOPT_VERSION, license, captions_required, tar.name, tar.size, tar.modified])
    if committed(uri, name, plan, plan + identity):
        return
    with on_this_machine(tar.uri, beside=local_path(join(uri, "shards"))) as source:
        try:
            with source.open("rb", buffering=READ_BYTES) as stream:
                entries, rejected, checksum, num_bytes = index_tar(stream, tar.name, license, captions_required)
        except CorruptArtifactError as error:
            raise CorruptArtifactError(f"{tar.uri}: {error}; replace it, or pass --skip-damaged") from error
        bring(source, tar_uri(uri, name))
    commit_shard(uri, name, entries, rejected, plan=plan, checksum=checksum, num_bytes=num_bytes)


def drop_repeats(uri: str, tar_of_name: Mapping[str, Tar], identity: str) -> dict[str, ShardCommit]:
    """Move rows that repeat an earlier row's key from the indexes to quarantine; return the commits of all shards."""
    names = list(tar_of_name)
    commits = {name: read_index(index_uri(uri, name))[1] for name in names}
    repeats: dict[str, list[Repeat]] = {}

    def keys_of(shard: int) -> pa.Array:
        return read_column(index_uri(uri, names[shard]), "key")

    for repeat in repeated_keys(keys_of, [shard.samples for shard in commits.values()]):
        repeats.setdefault(names[repeat.shard], []).append(repeat)
    for name, repeats_of_shard in repeats.items():
        index, shard = read_index(index_uri(uri, name))
        rejected = [
            {
                "source": tar_of_name[name].name,
                "key": repeat.key,
                "reason": str(Reason.key_repeated),
                "detail": f"{tar_of_name[names[repeat.first_shard]].name} has this key too, earlier",
            }
            for repeat in repeats_of_shard
        ]
        table = pa.Table.from_pylist(rejected, QUARANTINE)
        if shard.quarantined:  # only those from the scan: a run killed before it wrote the index below has added more
            system, path = filesystem(quarantine_uri(uri, name))
            with system.open_input_file(path) as stream:
                table = pa.concat_tables([pq.ParquetFile(stream).read().slice(0, shard.quarantined), table])
        write_parquet(quarantine_uri(uri, name), table)
        kept = np.setdiff1d(np.arange(index.num_rows), [repeat.row for repeat in repeats_of_shard])
        index = index.take(pa.array(kept))
        index = index.set_column(SCHEMA.get_field_index("row"), "row", pa.array(np.arange(index.num_rows)))
        reasons = Counter(shard.reasons) + Counter({str(Reason.key_repeated): len(rejected)})
        commits[name] = replace(
            shard,
            plan=shard.plan + identity,
            samples=index.num_rows,
            quarantined=table.num_rows,
            reasons=dict(sorted(reasons.items())),
        )
        write_index(index_uri(uri, name), index, commits[name])
    return commits


# --- one tar ----------------------------------------------------------------------------------------------------------


def index_tar(
    stream: IO[bytes], source: str, license: str | None, captions_required: bool
) -> tuple[list[Row], list[Row], str, int]:
    """(index rows, rejected records, xxh3_128 of the tar, its bytes), from one read to the end of the stream.

    Raises CorruptArtifactError for a damaged tar, naming the byte.
    """
    entries: list[Row] = []
    rejected: list[Row] = []
    hashed = _Hashed(stream)
    for key, members in read_groups(hashed):
        try:
            entries.append({"row": len(entries), **index_sample(key, members, license, captions_required)})
        except Rejected as rejection:
            fields = (f"{source}:{members[0][1].name}", key, str(rejection.reason), rejection.detail)
            # Names may contain bytes that are not UTF-8, which a table cannot hold.
            texts = (text.encode(errors="replace").decode() for text in fields)
            rejected.append(dict(zip(QUARANTINE.names, texts, strict=True)))
    return entries, rejected, hashed.digest.hexdigest(), hashed.bytes


class _Hashed(io.RawIOBase):
    """A stream that hashes what is read from it, so that a tar's bytes are read once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = xxhash.xxh3_128()
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        return data


def read_groups(stream: Any) -> Iterator[tuple[str, Group]]:
    """(key, [(suffix, member)]) of neighbours that share a key. A repeated suffix begins another sample of the key."""
    key: str | None = None
    group: Group = []
    for member in read_members(stream, _is_wanted):
        if isinstance(member, Damage):
            raise CorruptArtifactError(f"byte {member.offset}: {member.what}")
        split = split_name(member.name)
        if split is None:
            continue  # a README or a checksum file between the samples
        stem, suffix = split
        if group and (stem != key or any(suffix == other for other, _ in group)):
            yield str(key), group
            group = []
        key = stem
        group.append((suffix, member))
    if group:
        yield str(key), group


def _is_wanted(name: str) -> bool:
    split = split_name(name)
    return split is not None and split[1] in (*IMAGE_EXTENSIONS, *SIDECARS)


def index_sample(key: str, members: Group, license: str | None, captions_required: bool) -> Row:
    """A sample's row of the index, without its number. Raises Rejected."""
    if not key.isprintable() or len(key.encode(errors="surrogateescape")) > MAX_KEY_BYTES:
        raise Rejected(Reason.key_invalid, f"{key[:100]!a}: not printable, or over {MAX_KEY_BYTES} bytes")
    if key.startswith("/") or ".." in key.split("/"):
        raise Rejected(Reason.key_invalid, f"{key[:100]!r}: points outside of its folder")
    suffixes = dict(members)
    content = f"has {', '.join(suffixes)}"[:200]
    image = next((member for suffix, member in members if suffix in IMAGE_EXTENSIONS), None)
    if image is None:
        if any(suffix.rpartition(".")[2] in IMAGE_EXTENSIONS for suffix in suffixes):
            raise Rejected(Reason.key_invalid, f"{content}: a key with a dot, which merges it with its neighbours")
        raise Rejected(Reason.image_missing, content)
    txt = next((suffixes[suffix] for suffix in TEXTS if suffix in suffixes), None)
    fields = suffixes.get("json")
    for member in (image, txt, fields):
        if member is not None and member.body is None:
            raise Rejected(Reason.image_too_large, f"{member.name}: {member.size} bytes")
    bodies = [member.body or b"" if member is not None else b"" for member in (image, txt, fields)]
    if not is_json(bodies[2]):
        fields, bodies[2] = None, b""
    header = probe(bodies[0])
    try:
        captions, metadata = read_texts(bodies[1], bodies[2])
    except UnicodeDecodeError as error:
        raise Rejected(Reason.record_malformed, f"{txt.name if txt else ''}: not UTF-8: {error.reason}") from error
    if captions_required and not captions:
        raise Rejected(Reason.caption_missing, content)
    named = metadata.get("license")
    entry: Row = {
        "key": key,
        "image_extension": EXTENSIONS.get(header.format, header.format.lower()),
        "width": header.width,
        "height": header.height,
        **describe_captions(captions),
        "license": named if isinstance(named, str) else license,
        "frames": [],
    }
    for column, member, body in zip(MEMBERS, (image, txt, fields), bodies, strict=True):
        entry[f"{column}_offset"] = (member or image).offset
        entry[f"{column}_bytes"] = len(body)
        entry[f"{column}_xxh3"] = xxhash.xxh3_64_intdigest(body)
    return entry


def is_json(body: bytes) -> bool:
    """Whether a body is JSON that can be written again: half of a surrogate pair cannot."""
    with contextlib.suppress(ValueError, RecursionError):
        canonical_json(json.loads(body)).encode()
        return True
    return False
