"""(shard, row) to a sample by one positioned read, checked against the index; tar headers are never parsed here."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pyarrow import fs

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.storage import filesystem, join, local_path
from mmflow.dataset.ahead import ReadAhead
from mmflow.dataset.cache import CachedShard, ShardCache
from mmflow.dataset.manifest import CommittedShards, ShardInfo, index_uri
from mmflow.dataset.records import FRAME, RECORD, UNPACK_FRAME, UNPACK_RECORD, Records, read_records
from mmflow.dataset.samples import read_texts

OPEN_SHARDS = 64  # file descriptors and indexes that one reader keeps
SCAN_BYTES = 16 << 20  # of a remote shard read at once by a pass through it: a request costs what a megabyte does
RECORD_BYTES, FRAME_BYTES = RECORD.itemsize, FRAME.itemsize
Read = Callable[[int, int], bytes]  # (size, offset) → bytes
hash_of = xxhash.xxh3_64_intdigest
parse_json = json.JSONDecoder().raw_decode  # `json.loads` takes twice the time, on finding out encodings and ends


@dataclass(frozen=True)
class Caption:
    """A caption and its language (BCP 47; "und" where nobody said)."""

    text: str
    language: str


@dataclass(frozen=True)
class Sample:
    """One row of a shard as it is stored."""

    key: str
    image: bytes
    extension: str
    captions: tuple[Caption, ...]
    metadata: dict[str, object]
    frames: tuple[bytes, ...] = ()  # a clip's frames after the first, which is its image


class Members(NamedTuple):
    """A sample's files as they lie in the tar, each checked against its hash. An adopted one may lack a text: b""."""

    key: str
    image: bytes
    extension: str
    txt: bytes
    json: bytes
    frames: tuple[bytes, ...]


class Reader:
    """Access to the samples of one split, by shard and row. Safe between threads; another process gets its own.

    A local dataset is read where it lies, and a remote one through `cache`, or without one by two requests a sample.
    Without `frames`, a clip is its first frame alone, and the others are not read.
    """

    def __init__(
        self,
        dataset: CommittedShards,
        split: str,
        cache: ShardCache | None = None,
        *,
        frames: bool = True,
        open_shards: int = OPEN_SHARDS,
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.cache = cache
        self.frames = frames
        self.open_shards = open_shards
        self.shards = tuple(shard for shard in dataset.shards(split) if shard.samples)
        self._adopted = dataset.adopted
        # Functions that do not hold this reader: a circle would keep its files open until the next garbage collection.
        self._records = lru_cache(open_shards)(partial(_records_of, dataset, self.shards, frames))
        self._open = lru_cache(open_shards)(partial(_open_shard, dataset, self.shards, cache, self._records))
        self._ahead = ReadAhead(partial(_prepare, self._open))

    def __reduce__(self) -> tuple[Callable[..., Reader], tuple[object, ...]]:
        return partial(Reader, frames=self.frames, open_shards=self.open_shards), (self.dataset, self.split, self.cache)

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def __iter__(self) -> Iterator[Sample]:
        """Every sample, in the order of the tars."""
        for shard, info in enumerate(self.shards):
            if self.cache is not None and shard + 1 < len(self.shards):
                self.read_ahead(shard + 1, 0, 0)
            yield from self.samples(shard, 0, info.samples)

    def read(self, shard: int, row: int) -> Sample:
        """The sample of a shard (its ordinal in `shards`) and row.

        Raises MissingArtifactError for a shard that is not there, CorruptArtifactError, naming shard, row and key, for
        one that is not what was committed.
        """
        return self._parse(self.read_members(shard, row))

    def read_members(self, shard: int, row: int) -> Members:
        """The files of the sample, not parsed. Raises as `read`."""
        if self._ahead.failed:
            self._ahead.raise_failure(shard)
        opened = self._open(shard)
        return opened.members(row, opened.read)

    def samples(self, shard: int, first: int, stop: int) -> Iterator[Sample]:
        """The samples of rows first…stop-1 in their order, by long reads where each is a request. Raises as `read`."""
        return map(self._parse, self.scan(shard, first, stop))

    def scan(self, shard: int, first: int, stop: int) -> Iterator[Members]:
        """The files of `samples`, not parsed. Raises as `read`."""
        if self._ahead.failed:
            self._ahead.raise_failure(shard)
        opened = self._open(shard)
        read = opened.read if opened.is_here else _read_through(opened.read)
        for row in range(first, stop):
            yield opened.members(row, read)

    def texts(self, *, skip_corrupt: bool = False) -> Iterator[Sample]:
        """Every sample without its picture, which is not read: `image` is empty. Raises as `read`, or with
        `skip_corrupt` passes over a sample whose texts are not what was committed."""
        for shard, info in enumerate(self.shards):
            opened = self._open(shard)
            read = opened.read if opened.is_here else _read_through(opened.read)
            for row in range(info.samples):
                try:
                    yield self._parse(opened.members(row, read, image=False))
                except CorruptArtifactError:
                    if not skip_corrupt:
                        raise

    def lengths(self, shard: int) -> NDArray[np.int32]:
        """(rows,): an estimate of the tokens of each sample's longest caption. The tar is not touched."""
        return self._records(shard).caption_tokens

    def read_ahead(self, shard: int, first_row: int, last_row: int) -> None:
        """Have a shard opened, and its rows from the first to the last brought into memory or its tar into the cache.

        Returns at once. What goes wrong is raised by the next read of that shard.
        """
        self._ahead.ask(shard, first_row, last_row)

    def check(self) -> None:
        """Look, by two listings, whether every tar and index of the split is there and as long as it was.

        Raises MissingArtifactError or CorruptArtifactError, naming the first that is not.
        """
        tars, indexes = _list(self.dataset.uri, "shards"), _list(self.dataset.uri, "index")
        for shard in self.shards:
            found = tars.get(f"{shard.name}.tar")
            if found is None:
                raise MissingArtifactError(f"{self.dataset.tar_uri(shard)}: no such file")
            _check_size(self.dataset, shard, found)
            if f"{shard.name}.parquet" not in indexes:
                raise MissingArtifactError(f"{index_uri(self.dataset.uri, shard.name)}: no such file")

    def _parse(self, members: Members) -> Sample:
        key, image, extension, txt, body, frames = members
        if self._adopted:
            found, metadata = read_texts(txt, body)
        else:
            fields = parse_json(body.decode())[0]
            found, metadata = fields["captions"], fields["metadata"]
        captions = tuple([Caption(each["text"], each["language"]) for each in found])
        return Sample(key, image, extension, captions, metadata, frames)


@dataclass(frozen=True)
class _OpenShard:
    uri: str
    dataset: str  # its URI
    num_rows: int
    records: Records
    read: Read
    prepare: Callable[[int, int], None]  # (offset, size): have them in memory, or the tar in the cache, before long
    is_here: bool  # on this machine
    cached: CachedShard | None = None

    def members(self, row: int, read: Read, *, image: bool = True) -> Members:
        """A row's files. The image is read on its own: cut out of a longer read, its bytes would be copied twice."""
        if not 0 <= row < self.num_rows:
            raise MisuseError(f"{self.uri}: no row {row}; it has {self.num_rows}")
        record = UNPACK_RECORD(self.records.packed, row * RECORD_BYTES)
        try:
            return self._members(row, record, read, image)
        except CorruptArtifactError:
            if self.cached is None or not self.cached.mend():
                raise
        return self._members(row, record, read, image)

    def _members(self, row: int, record: tuple[int, ...], read: Read, with_image: bool) -> Members:
        (
            base, rest_bytes,
            image_at, image_bytes, image_xxh3, txt_at, txt_bytes, txt_xxh3, json_at, json_bytes, json_xxh3,
            key_at, key_bytes, extension, first_frame, num_frames,
        ) = record  # fmt: skip
        records = self.records
        key = records.keys[key_at : key_at + key_bytes].decode()
        image = read(image_bytes, image_at) if with_image else b""
        rest = read(rest_bytes, base) if rest_bytes else b""
        txt = rest[txt_at - base : txt_at - base + txt_bytes] if txt_bytes else b""
        body = rest[json_at - base : json_at - base + json_bytes] if json_bytes else b""
        if with_image and hash_of(image) != image_xxh3:
            raise self.corrupt("image", row, key)
        if hash_of(txt) != txt_xxh3:
            raise self.corrupt("txt", row, key)
        if hash_of(body) != json_xxh3:
            raise self.corrupt("json", row, key)
        if not num_frames:
            return Members(key, image, records.extensions[extension], txt, body, ())
        frames = []
        for number in range(num_frames):
            at, size, xxh3 = UNPACK_FRAME(records.frames, (first_frame + number) * FRAME_BYTES)
            frames.append(rest[at - base : at - base + size])
            if hash_of(frames[-1]) != xxh3:
                raise self.corrupt(f"frame {number + 1}", row, key)
        return Members(key, image, records.extensions[extension], txt, body, tuple(frames))

    def corrupt(self, member: str, row: int, key: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"{self.uri}: {member} of row {row} ({key}) is not what was written; run `mmflow verify {self.dataset}`"
        )


def _records_of(dataset: CommittedShards, shards: tuple[ShardInfo, ...], frames: bool, shard: int) -> Records:
    return read_records(dataset, shards[shard], frames=frames)


def _open_shard(
    dataset: CommittedShards,
    shards: tuple[ShardInfo, ...],
    cache: ShardCache | None,
    records_of: Callable[[int], Records],
    shard: int,
) -> _OpenShard:
    info, records = shards[shard], records_of(shard)
    uri = dataset.tar_uri(info)
    path = local_path(uri)
    opened = partial(_OpenShard, uri, dataset.uri, info.samples, records)
    if path is None and cache is not None:
        copy = cache.shard(uri, info.checksum, info.bytes)
        return opened(copy.read, copy.prepare, True, copy)
    try:
        if path is None:
            system, remote = filesystem(uri)
            stream = system.open_input_file(remote)
            _check_size(dataset, info, stream.size())
            # pyarrow's own streams may be read by several threads at once, those of fsspec may not.
            guard = threading.Lock() if isinstance(system, fs.PyFileSystem) else contextlib.nullcontext()
            return opened(partial(_read_remote, stream, guard), _nothing, False)
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error
    _check_size(dataset, info, os.fstat(file.fileno()).st_size)
    return opened(partial(_read_local, file), partial(_advise, file), True)


def _read_local(file: IO[bytes], size: int, offset: int) -> bytes:
    try:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise CorruptArtifactError(f"{file.name}: byte {offset} cannot be read ({error.strerror})") from error


def _read_remote(stream: Any, guard: AbstractContextManager[Any], size: int, offset: int) -> bytes:
    with guard:
        return bytes(stream.read_at(size, offset))


def _read_through(read: Read) -> Read:
    """A `read` for places that ascend: many of them are answered from one long request."""
    start, data = 0, b""

    def found(size: int, offset: int) -> bytes:
        nonlocal start, data
        if not start <= offset <= start + len(data) - size:
            start, data = offset, read(max(size, SCAN_BYTES), offset)
        return data[offset - start : offset - start + size]

    return found


def _advise(file: IO[bytes], offset: int, size: int) -> None:
    os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def _check_size(dataset: CommittedShards, info: ShardInfo, found: int) -> None:
    if found != info.bytes:
        raise CorruptArtifactError(
            f"{dataset.tar_uri(info)}: {found} bytes, the manifest says {info.bytes}: it was altered after its commit; "
            f"run `mmflow verify {dataset.uri}`"
        )


def _prepare(open_shard: Callable[[int], _OpenShard], shard: int, first_row: int, last_row: int) -> None:
    opened = open_shard(shard)
    rows = opened.records.table[[first_row, last_row]]
    start = int(min(rows["image_offset"].min(), rows["rest_offset"].min()))
    stop = int(max((rows[f"{part}_offset"] + rows[f"{part}_bytes"]).max() for part in ("image", "rest")))
    opened.prepare(start, stop - start)


def _list(uri: str, folder: str) -> dict[str, int]:
    """The files of a folder of the dataset, and their bytes."""
    system, path = filesystem(join(uri, folder))
    return {info.base_name: info.size for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True))}


def _nothing(*_: int) -> None:
    pass
