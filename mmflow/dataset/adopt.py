"""Tars that others wrote, as a dataset: an index and a manifest beside them, and not a byte of them changed.

Each tar is read once, in order, and linked or copied under our name. What cannot be trained on stays in its tar and is
named in quarantine; what damaged tars would silently lose is refused.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from mmflow.core.artifacts import MANIFEST, Artifact, commit, content_hash, exclusive, read_artifact
from mmflow.core.errors import CorruptArtifactError, MisuseError, MmflowError
from mmflow.core.listing import find
from mmflow.core.storage import exists, filesystem, join, local_path, write_json
from mmflow.dataset.bring import bring, on_this_machine
from mmflow.dataset.index import SCHEMA, ShardCommit, read_column, read_index_and_commit, write_index, write_parquet
from mmflow.dataset.keys import Repeat, repeated_keys
from mmflow.dataset.manifest import KIND, ShardInfo, fingerprint_of, index_uri, quarantine_uri, shard_name, tar_uri
from mmflow.dataset.samples import Row, index_tar
from mmflow.dataset.write import QUARANTINE
from mmflow.sources.reasons import Reason
from mmflow.sources.records import SPLIT

ADOPT_VERSION = 1  # raise it when the same tars come to make another index
READ_BYTES = 1 << 20
DAMAGED = "damaged"  # the quarantine's table of tars left out whole
UNDER_WAY = "adopting.json"  # that what lies in a directory without a manifest is an adoption's, to go on with


@dataclass(frozen=True, kw_only=True)
class Tar:
    """One of the tars to adopt. `modified` in ns: with the size, whether it is still the one that was scanned."""

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
    """Commit the dataset at `uri` of tars that others wrote (paths or URIs, globs and brace ranges), each a shard.

    Where it was committed from the same tars before, that is returned at once; a killed adoption goes on. `license` is
    that of records that name none; without `captions_required` pictures alone are samples too. Raises MisuseError for
    tars that are not there or for another dataset at `uri`, CorruptArtifactError at a damaged tar, unless those are
    skipped. Memory: a shard's index, and 8 bytes a key.
    """
    if not SPLIT.fullmatch(split):
        raise MisuseError(f"split {split!r}: lower-case letters, digits, - and _ are needed, at most 40")
    found = list_tars(tars)
    settings = {"split": split, "license": license, "skip_damaged": skip_damaged}
    if not captions_required:  # named only where it is so: what was adopted before there was a choice stays what it is
        settings["captions_required"] = False
    asked = {"version": ADOPT_VERSION, **settings, "tars": [(tar.name, tar.size) for tar in found]}
    identity = content_hash(asked)[:16]
    with exclusive(uri):
        if exists(join(uri, MANIFEST)):
            committed = read_artifact(uri, KIND)
            if committed.manifest.get("identity") != identity:
                raise MisuseError(f"{uri}: a dataset of other tars or settings is here; name a new directory")
            return committed
        check_directory(uri, found)
        write_json(join(uri, UNDER_WAY), asked)
        tar_of_name: dict[str, Tar] = {}
        damaged: list[Row] = []
        for done, tar in enumerate(found):
            progress(done, len(found))
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
        marks = drop_repeats(uri, tar_of_name, identity)
        remove_strays(uri, marks, keep_damaged=bool(damaged))
        infos = [
            ShardInfo(name=name, split=split, samples=each.samples, bytes=each.bytes, checksum=each.checksum)
            for name, each in marks.items()
        ]
        fields = {
            "identity": identity,
            "inputs": {},
            "adopted": True,
            "fingerprint": fingerprint_of(infos),
            "shards": [asdict(info) for info in infos],
            "totals": total(uri, infos, list(marks.values()), len(damaged)),
            "sources": [
                {"name": tar.name, "shard": name, "xxh3_128": marks[name].checksum} for name, tar in tar_of_name.items()
            ],
            "settings": settings,
        }
        committed = commit(uri, KIND, fields)
        delete(join(uri, UNDER_WAY))
        return committed


def list_tars(patterns: Sequence[str]) -> list[Tar]:
    """The tars in the order given, each once. Raises MisuseError for what is not there or no file."""
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
    """Raises MisuseError where files of others are, the tars among them: under our names they would be overwritten."""
    system, path = filesystem(uri)
    inside = [tar.uri for tar in tars if filesystem(tar.uri)[1].startswith(path.rstrip("/") + "/")]
    if inside:
        raise MisuseError(f"{inside[0]}: lies in {uri} itself; name a new directory, which will hold links to the tars")
    files = {info.base_name for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True))}
    if UNDER_WAY not in files and files - {".lock"}:
        raise MisuseError(f"{uri}: not empty ({min(files - {'.lock'})}); name a new directory")


def adopt_tar(uri: str, name: str, tar: Tar, license: str | None, captions_required: bool, identity: str) -> None:
    """Index one tar as a shard, unless an earlier run did. Raises CorruptArtifactError, naming the byte.

    An index that has lost its repeats already is of use only to the same adoption: among other tars others repeat.
    """
    optional = [] if captions_required else ["captions optional"]
    plan = content_hash([ADOPT_VERSION, license, tar.name, tar.size, tar.modified, *optional])
    with contextlib.suppress(MmflowError):
        written = read_index_and_commit(index_uri(uri, name))[1]
        system, path = filesystem(tar_uri(uri, name))
        if written.plan in (plan, plan + identity) and system.get_file_info(path).size == written.bytes:
            return
    with on_this_machine(tar.uri, beside=local_path(join(uri, "shards"))) as source:
        try:
            with source.open("rb", buffering=READ_BYTES) as stream:
                entries, rejected, checksum, size = index_tar(stream, tar.name, license, captions_required)
        except CorruptArtifactError as error:
            raise CorruptArtifactError(f"{tar.uri}: {error}; get it anew, or pass --skip-damaged") from error
        bring(source, tar_uri(uri, name))
    if rejected:
        write_parquet(quarantine_uri(uri, name), pa.Table.from_pylist(rejected, QUARANTINE))
    marks = ShardCommit(
        plan=plan,
        checksum=checksum,
        bytes=size,
        samples=len(entries),
        quarantined=len(rejected),
        reasons=dict(sorted(Counter(row["reason"] for row in rejected).items())),
    )
    write_index(index_uri(uri, name), pa.Table.from_pylist(entries, SCHEMA), marks)


def drop_repeats(uri: str, tar_of_name: Mapping[str, Tar], identity: str) -> dict[str, ShardCommit]:
    """Move rows whose key an earlier row has from the indexes to quarantine; return the marks of all shards."""
    names = list(tar_of_name)
    marks = {name: read_index_and_commit(index_uri(uri, name))[1] for name in names}
    repeats: dict[str, list[Repeat]] = {}

    def keys_of(shard: int) -> pa.Array:
        return read_column(index_uri(uri, names[shard]), "key")

    for repeat in repeated_keys(keys_of, [mark.samples for mark in marks.values()]):
        repeats.setdefault(names[repeat.shard], []).append(repeat)
    for name, found in repeats.items():
        index, mark = read_index_and_commit(index_uri(uri, name))
        rejected = [
            {
                "source": tar_of_name[name].name,
                "key": repeat.key,
                "reason": str(Reason.key_repeated),
                "detail": f"{tar_of_name[names[repeat.first_shard]].name} has this key too, earlier",
            }
            for repeat in found
        ]
        table = pa.Table.from_pylist(rejected, QUARANTINE)
        if mark.quarantined:  # as many as the scan found: a run killed before the index below has left more
            table = pa.concat_tables([_read_rejected(uri, name).slice(0, mark.quarantined), table])
        write_parquet(quarantine_uri(uri, name), table)
        kept = np.setdiff1d(np.arange(index.num_rows), [repeat.row for repeat in found])
        index = index.take(pa.array(kept))
        index = index.set_column(SCHEMA.get_field_index("row"), "row", pa.array(np.arange(index.num_rows)))
        reasons = Counter(mark.reasons) + Counter({str(Reason.key_repeated): len(found)})
        marks[name] = replace(
            mark,
            plan=mark.plan + identity,
            samples=index.num_rows,
            quarantined=table.num_rows,
            reasons=dict(sorted(reasons.items())),
        )
        write_index(index_uri(uri, name), index, marks[name])
    return marks


def total(uri: str, infos: Sequence[ShardInfo], marks: Sequence[ShardCommit], num_damaged: int) -> Row:
    """The manifest's totals; a damaged tar is one record. Raises MmflowError where no sample is left."""
    reasons = Counter({str(Reason.source_damaged): num_damaged} if num_damaged else {})
    for mark in marks:
        reasons.update(mark.reasons)
    splits: Counter[str] = Counter()
    for info in infos:
        splits[info.split] += info.samples
    samples, quarantined = splits.total(), reasons.total()
    if not samples:
        raise MmflowError(f"{uri}: no sample in {len(infos)} tars: {dict(reasons)}; see quarantine/")
    return {
        "records": samples + quarantined,
        "samples": samples,
        "quarantined": quarantined,
        "bytes": sum(info.bytes for info in infos),
        "splits": dict(splits),
        "reasons": dict(sorted(reasons.items())),
    }


def remove_strays(uri: str, marks: Mapping[str, ShardCommit], *, keep_damaged: bool) -> None:
    """Delete what an abandoned adoption left here."""
    quarantined = {f"{name}.parquet" for name, mark in marks.items() if mark.quarantined}
    if keep_damaged:
        quarantined.add(f"{DAMAGED}.parquet")
    expected = {
        "shards": {f"{name}.tar" for name in marks},
        "index": {f"{name}.parquet" for name in marks},
        "quarantine": quarantined,
    }
    for folder, names in expected.items():
        system, path = filesystem(join(uri, folder))
        for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            if info.is_file and info.base_name not in names:
                system.delete_file(info.path)


def delete(uri: str) -> None:
    """Delete a file, if it is there."""
    system, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


def _read_rejected(uri: str, name: str) -> pa.Table:
    system, path = filesystem(quarantine_uri(uri, name))
    with system.open_input_file(path) as stream:
        return pq.ParquetFile(stream).read()
