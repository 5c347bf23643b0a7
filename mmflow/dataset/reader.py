"""The samples of a split by (shard, row), with shards opened and read ahead as they are needed."""

from __future__ import annotations

import json
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmflow.cleaning.captions import Caption as StoredCaption
from mmflow.cleaning.captions import clean_text
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.dataset.cache import ShardCache
from mmflow.dataset.format import CommittedShards, index_uri, list_folder
from mmflow.dataset.shard import Members, OpenShard, Records, check_size, open_shard, read_records

OPEN_SHARDS = 64  # file descriptors and indexes that one reader keeps
NUM_THREADS = 4  # one remote connection is slower than a node's network
FORGET_SECONDS = 60.0  # a loader asks for the same rows with every batch; within this time they are read ahead once
TEXT_KEYS = ("captions", "caption", "text", "TEXT")  # of captions in others' JSON
parse_json = json.JSONDecoder().raw_decode  # `json.loads` takes twice as long: it detects encodings and checks ends

Range = tuple[int, int, int]  # shard, first row, last row


@dataclass(frozen=True)
class Caption:
    """A caption and its language (BCP 47; "und" if unknown)."""

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


class Attempt(NamedTuple):
    """What came of reading one row: a sample, or the error."""

    row: int
    key: str
    sample: Sample | None
    error: Exception | None


class Reader:
    """Access to the samples of one split. Threads may share a reader; another process gets its own by pickling.

    A local dataset is read where it is. A remote one is read through `cache`, or without one by two requests a sample.
    Without `frames`, a clip is only its first frame, and the others are not read.
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
        # Functions that do not refer to this reader: a cycle would keep its files open until a garbage collection.
        shards = self.shards
        records = lru_cache(open_shards)(lambda shard: read_records(dataset, shards[shard], frames=frames))
        opened = lru_cache(open_shards)(lambda shard: open_shard(dataset, shards[shard], records(shard), cache))
        self._records: Callable[[int], Records] = records
        self._open: Callable[[int], OpenShard] = opened
        self._ahead = ReadAhead(lambda shard, first, last: opened(shard).prepare_rows(first, last))

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
        """The sample of a shard (its position in `shards`) and row.

        Raises MissingArtifactError for a shard that is gone, CorruptArtifactError, naming shard, row and key, for a
        sample that is not what was committed.
        """
        return self._parse(self.read_members(shard, row))

    def read_members(self, shard: int, row: int) -> Members:
        """The files of the sample, not parsed. Raises as `read`."""
        opened = self._opened(shard)
        return opened.members(row, opened.read)

    def samples(self, shard: int, first: int, stop: int) -> Iterator[Sample]:
        """The samples of rows first…stop-1, with long reads if each would be a request. Raises as `read`."""
        return map(self._parse, self.scan(shard, first, stop))

    def scan(self, shard: int, first: int, stop: int) -> Iterator[Members]:
        """The files of `samples`, not parsed. Raises as `read`."""
        opened = self._opened(shard)
        read = opened.scanning_read()
        for row in range(first, stop):
            yield opened.members(row, read)

    def attempts(self, shard: int, first: int, stop: int, *, image: bool = True) -> Iterator[Attempt]:
        """The samples of rows first…stop-1, each with its key or what is wrong with it; the others are read all the
        same. Without `image`, pictures are not read and empty. Raises MissingArtifactError for a shard that is gone."""
        opened = self._opened(shard)
        read = opened.scanning_read()
        for row in range(first, stop):
            try:
                yield Attempt(row, opened.key(row), self._parse(opened.members(row, read, image=image)), None)
            except (CorruptArtifactError, ValueError) as error:
                yield Attempt(row, opened.key(row), None, error)

    def texts(self, *, skip_corrupt: bool = False) -> Iterator[Sample]:
        """Every sample without its picture, which is not read: `image` is empty.

        Raises as `read`, or with `skip_corrupt` leaves out samples with texts that are not what was committed.
        """
        for shard, info in enumerate(self.shards):
            opened = self._open(shard)
            read = opened.scanning_read()
            for row in range(info.samples):
                try:
                    yield self._parse(opened.members(row, read, image=False))
                except CorruptArtifactError:
                    if not skip_corrupt:
                        raise

    def lengths(self, shard: int) -> NDArray[np.int32]:
        """(rows,): an estimate of the tokens of each sample's longest caption, from the index alone."""
        return self._records(shard).caption_tokens

    def read_ahead(self, shard: int, first_row: int, last_row: int) -> None:
        """Have a shard opened, and its rows from the first to the last brought into memory or its tar into the cache.

        Returns at once. Errors are raised by the next read of that shard.
        """
        self._ahead.ask(shard, first_row, last_row)

    def check(self) -> None:
        """Check, by two listings, that every tar and index of the split is there and that every tar has its size.

        Raises MissingArtifactError or CorruptArtifactError, naming the first that is wrong.
        """
        tars, indexes = (list_folder(self.dataset.uri, folder) for folder in ("shards", "index"))
        for shard in self.shards:
            size = tars.get(f"{shard.name}.tar")
            if size is None:
                raise MissingArtifactError(f"{self.dataset.tar_uri(shard)}: no such file")
            check_size(self.dataset, shard, size)
            if f"{shard.name}.parquet" not in indexes:
                raise MissingArtifactError(f"{index_uri(self.dataset.uri, shard.name)}: no such file")

    def _opened(self, shard: int) -> OpenShard:
        if self._ahead.failed:
            self._ahead.raise_failure(shard)
        return self._open(shard)

    def _parse(self, members: Members) -> Sample:
        key, image, extension, txt, body, frames = members
        if self._adopted:
            stored, metadata = read_texts(txt, body)
        else:
            fields = parse_json(body.decode())[0]
            stored, metadata = fields["captions"], fields["metadata"]
        captions = tuple([Caption(caption["text"], caption["language"]) for caption in stored])
        return Sample(key, image, extension, captions, metadata, frames)


# --- others' samples --------------------------------------------------------------------------------------------------


def read_texts(txt: bytes, body: bytes) -> tuple[tuple[StoredCaption, ...], dict[str, Any]]:
    """(captions, metadata) of a sample that others may have written, from its .txt and .json; either may be empty.

    A JSON of ours has both, even if there is no caption. In others' samples, the .txt is the caption if it has text,
    else the JSON's captions, caption, text or TEXT; all of the JSON is metadata. Raises ValueError for what is not text
    or not JSON.
    """
    value = json.loads(body) if body else {}
    metadata = value if isinstance(value, dict) else {"json": value}
    ours = _our_captions(metadata.get("captions")) if isinstance(metadata.get("metadata"), dict) else None
    if ours:
        return ours, metadata["metadata"]
    if text := clean_text(txt.decode()):
        return (StoredCaption(language="und", text=text),), metadata
    # In a JSON with other keys too, an empty list may not be ours, and the captions may be under another key.
    if ours is not None and set(metadata) == {"captions", "metadata"}:
        return (), metadata["metadata"]
    for key in TEXT_KEYS:
        if captions := _their_captions(metadata.get(key)):
            return captions, metadata
    return (), metadata


def _our_captions(value: Any) -> tuple[StoredCaption, ...] | None:
    if not isinstance(value, list):
        return None
    if not all(isinstance(item, dict) and item.keys() == {"language", "text"} for item in value):
        return None
    return tuple(StoredCaption(language=item["language"], text=item["text"]) for item in value)


def _their_captions(value: Any) -> tuple[StoredCaption, ...]:
    """The captions of others' JSON: a string, an object with a text, or a list of these."""
    captions = []
    for item in value if isinstance(value, list) else [value]:
        fields = item if isinstance(item, dict) else {"text": item}
        text, language = fields.get("text", fields.get("caption")), fields.get("language")
        if isinstance(text, str) and (text := clean_text(text)):
            tag = language if isinstance(language, str) and language else "und"
            captions.append(StoredCaption(language=tag, text=text))
    return tuple(captions)


# --- reading ahead ----------------------------------------------------------------------------------------------------


class ReadAhead:
    """Runs `work(shard, first, last)` in a few threads, in the order asked. Errors reach the reader of that shard.

    The threads start with the first request and end with this object.
    """

    def __init__(self, work: Callable[[int, int, int], None]) -> None:
        self.failed: dict[int, BaseException] = {}  # shard → its error
        self._asked: dict[Range, float] = {}  # time of the last request, oldest first
        self._guard = threading.Lock()
        self._queue: queue.Queue[Range | None] = queue.Queue()
        self._started = False
        self._work = work

    def ask(self, shard: int, first: int, last: int) -> None:
        """Have a range worked on, unless it was asked for recently. Returns at once."""
        wanted, now = (shard, first, last), time.monotonic()
        with self._guard:
            is_new = self._asked.pop(wanted, None) is None
            self._asked[wanted] = now
            while self._asked[oldest := next(iter(self._asked))] < now - FORGET_SECONDS:
                del self._asked[oldest]
            if is_new and not self._started:
                self._started = True
                # Not a bound method: a thread that refers to this object would keep it, and its open files, for ever.
                arguments = (self._queue, self.failed, self._work)
                for _ in range(NUM_THREADS):
                    threading.Thread(target=_run, args=arguments, name="mmflow-read-ahead", daemon=True).start()
                weakref.finalize(self, _end, self._queue)
        if is_new:
            self._queue.put(wanted)

    def raise_failure(self, shard: int) -> None:
        """Raise the shard's error, once: a second attempt is the reader's own."""
        error = self.failed.pop(shard, None)
        if error is not None:
            with self._guard:
                self._asked = {wanted: when for wanted, when in self._asked.items() if wanted[0] != shard}
            raise error


def _run(
    ranges: queue.Queue[Range | None], failed: dict[int, BaseException], work: Callable[[int, int, int], None]
) -> None:
    while (wanted := ranges.get()) is not None:
        try:
            work(*wanted)
        except BaseException as error:  # whatever it is, the shard's reader must see it
            failed[wanted[0]] = error


def _end(ranges: queue.Queue[Range | None]) -> None:
    for _ in range(NUM_THREADS):
        ranges.put(None)
