"""The store of fetched URLs: packs of bytes, and tables that say what lies where, or why there is nothing.

    <store>/packs/<run>-<task>-….pack      bodies, one after another
    <store>/known/<run>-<task>-….parquet   rows of KNOWN; published after its pack, so whatever it names is there

Files are only added, each whole or absent: a killed fetch leaves complete tables, and at most a pack without a table,
which a later run removes.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

from mmflow.core.errors import CorruptArtifactError
from mmflow.core.storage import filesystem, join, publish
from mmflow.fetch.client import Result, Validators
from mmflow.sources.reasons import Reason, Rejected

# A kill loses no more than this of a task's work; smaller packs would make many files, and tables slow to open.
RESULTS_PER_TABLE = 1_000
BYTES_PER_PACK = 256 << 20
SECONDS_PER_TABLE = 30.0
# A pack of this age without a table is a killed task's: a live task publishes the table seconds after its pack.
STRAY_SECONDS = 3_600.0
OPEN_PACKS = 32  # file handles kept by a reader

# `reason` is null if there is a body; then `pack`, `offset`, `bytes` and `xxh3` say where it lies. Otherwise they are
# null, 0 and zeros, except for fetch_too_large: its `bytes` is the limit that the body exceeded. The newest row of a
# URL counts, by `run` and then by `time` (milliseconds since 1970). `detail` has no query string; `url` is as written.
KNOWN = pa.schema(
    [
        ("url_hash", pa.binary(16)),
        ("url", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("status", pa.int16()),
        ("etag", pa.string()),
        ("last_modified", pa.string()),
        ("pack", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("xxh3", pa.binary(16)),
        ("run", pa.int64()),
        ("time", pa.int64()),
    ]
)
NAME = re.compile(r"(\d{6,})-\d{4,}-[0-9a-f]{8}\.(pack|parquet)")
NO_HASH = bytes(16)
OK = "ok"

Keys = npt.NDArray[np.uint64]  # (n, 2): hashes as two integers, which sort ten times faster than their 16 bytes
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a URL's body lies."""

    pack: str
    offset: int
    size: int  # bytes
    xxh3: bytes


class FetchedStore:
    """What the store held when it was opened, in about 80 bytes of memory per URL. Picklable: it opens again."""

    def __init__(self, uri: str, validators: bool = False) -> None:
        self.uri = uri
        self._with_validators = validators
        self._packs: OrderedDict[str, Any] = OrderedDict()
        table = _newest(_read_tables(uri, validators))
        # Separate arrays, because searching a column of a wider array copies all of it each time.
        self._high, self._low = (np.ascontiguousarray(half) for half in _keys_of(table["url_hash"]).T)
        self._xxh3 = _keys_of(table["xxh3"])
        self._offset: Rows = table["offset"].to_numpy()
        self._bytes: Rows = table["bytes"].to_numpy()
        self._pack = table["pack"].combine_chunks().dictionary_encode()
        self._detail = table["detail"].combine_chunks().dictionary_encode()
        reason = table["reason"].fill_null(OK).combine_chunks().dictionary_encode()
        self._verdicts: list[str] = [*reason.dictionary.to_pylist(), str(Reason.fetch_pending)]
        # One more value, so that row -1, which stands for an unknown URL, reads as pending.
        self._verdict: Rows = np.append(reason.indices.to_numpy(), len(self._verdicts) - 1).astype(np.int64)
        self._etag = table["etag"] if validators else None
        self._last_modified = table["last_modified"] if validators else None

    def __reduce__(self) -> tuple[Any, ...]:
        return FetchedStore, (self.uri, self._with_validators)

    def load(self, url: str) -> bytes:
        """The bytes of a URL. Raises Rejected with the reason why there are none; fetch_pending for an unknown URL.

        Raises CorruptArtifactError if the bytes changed since they were fetched.
        """
        entry = self.entry(url)
        name = join(self.uri, "packs", entry.pack)
        try:
            body = bytes(self._open(name).read_at(entry.size, entry.offset))
        except FileNotFoundError:
            body = b""
        if len(body) != entry.size or xxh3(body) != entry.xxh3:
            table = entry.pack.replace(".pack", ".parquet")
            raise CorruptArtifactError(
                f"{name}: {entry.size} bytes at {entry.offset} are damaged; delete it and known/{table}, fetch again"
            )
        return body

    def entry(self, url: str) -> Entry:
        """Where the body lies. Raises Rejected where there is none."""
        row = self._row(url)
        if row < 0:
            raise Rejected(Reason.fetch_pending, "not fetched yet")
        verdict = self._verdicts[int(self._verdict[row])]
        if verdict != OK:
            raise Rejected(Reason(verdict), self._detail[row].as_py() or "")
        return Entry(self._pack[row].as_py(), int(self._offset[row]), int(self._bytes[row]), self._xxh3[row].tobytes())

    def verdict(self, url: str) -> str:
        """`ok`, or the reason why there are no bytes; fetch_pending for an unknown URL."""
        return self._verdicts[int(self._verdict[self._row(url)])]

    def validators(self, url: str) -> Validators | None:
        """For a conditional request, if the URL's bytes are here. The store must be opened with `validators`."""
        if self._etag is None or self._last_modified is None or self.verdict(url) != OK:
            return None
        row = self._row(url)
        return Validators(self._etag[row].as_py(), self._last_modified[row].as_py())

    def counts(self, urls: Sequence[str]) -> dict[str, int]:
        """How many distinct URLs have each verdict, including `ok`."""
        verdicts = self._verdict[self._find(_unique(url_hashes(urls)))]
        counts = Counter({self._verdicts[code]: int(number) for code, number in enumerate(np.bincount(verdicts))})
        return {verdict: number for verdict, number in sorted(counts.items()) if number}

    def pending(self, urls: Sequence[str], *, max_bytes: int) -> list[str]:
        """URLs that a fetch may change: unknown, failed for now, or too large for a limit below `max_bytes`."""
        rows = self._find(url_hashes(urls))
        codes = self._verdict[rows]
        wanted = np.isin(self._verdicts, [Reason.fetch_pending, Reason.fetch_failed])[codes]
        was_large = np.isin(self._verdicts, [Reason.fetch_too_large])[codes]
        wanted |= was_large & (np.append(self._bytes, 0)[rows] < max_bytes)
        return [urls[index] for index in np.flatnonzero(wanted).tolist()]

    def fingerprint(self, urls: Iterable[str]) -> str:
        """sha256 (hex) over (URL, verdict, xxh3 of the body) in any order: what a dataset of these URLs depends on."""
        keys = _unique(url_hashes(urls))
        rows = self._find(keys)
        verdicts = url_hashes(self._verdicts)
        digest = sha256(keys.tobytes())
        digest.update(verdicts[self._verdict[rows]].tobytes())
        digest.update(np.append(self._xxh3, np.zeros((1, 2), np.uint64), axis=0)[rows].tobytes())
        return digest.hexdigest()

    def _row(self, url: str) -> int:
        return int(self._find(url_hashes([url]))[0])

    def _find(self, keys: Keys) -> Rows:
        """The row of each key, -1 for unknown ones, (keys,)."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        at = np.searchsorted(self._high, keys[:, 0]).astype(np.int64)
        left = np.arange(len(keys))
        while len(left):  # once, except for keys with equal first halves
            left = left[at[left] < len(self._high)]
            left = left[self._high[at[left]] == keys[left, 0]]
            equal = self._low[at[left]] == keys[left, 1]
            rows[left[equal]] = at[left[equal]]
            left = left[~equal]
            at[left] += 1
        return rows

    def _open(self, name: str) -> Any:
        handle = self._packs.get(name)
        if handle is None:
            system, path = filesystem(name)
            handle = self._packs[name] = system.open_input_file(path)
            if len(self._packs) > OPEN_PACKS:
                self._packs.popitem(last=False)
        self._packs.move_to_end(name)
        return handle


def _read_tables(uri: str, validators: bool) -> pa.Table:
    """All rows of all tables without the URLs themselves, and without validators unless asked for."""
    left_out = {"url", "status"} | (set() if validators else {"etag", "last_modified"})
    columns = [name for name in KNOWN.names if name not in left_out]
    system, files = _list_tables(uri)
    if not files:
        return KNOWN.empty_table().select(columns)
    return ds.dataset(files, KNOWN, format="parquet", filesystem=system).to_table(columns=columns)


def _newest(table: pa.Table) -> pa.Table:
    """The newest row of each URL, in the order of their keys."""
    keys = _keys_of(table["url_hash"])
    order = np.lexsort((table["time"].to_numpy(), table["run"].to_numpy(), keys[:, 1], keys[:, 0]))
    return table.take(pa.array(order[_last_of_each(keys[order])]))


def _unique(keys: Keys) -> Keys:
    ordered: Keys = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    return ordered[_last_of_each(ordered)]


def _last_of_each(ordered: Keys) -> npt.NDArray[np.bool_]:
    return np.append((ordered[1:] != ordered[:-1]).any(axis=1), True)[: len(ordered)]


def _keys_of(column: pa.ChunkedArray) -> Keys:
    """A column of hashes as integers, (rows, 2)."""
    array = column.combine_chunks()
    if not len(array):
        return np.empty((0, 2), dtype=np.uint64)
    return np.frombuffer(array.buffers()[1], "<u8", 2 * len(array), 16 * array.offset).reshape(-1, 2)


# --- writing ----------------------------------------------------------------------------------------------------------


class KnownWriter:
    """Collects results into a pack and its table. What is not published when the `with` block ends leaves no trace."""

    def __init__(self, store: str, run: int, task: int) -> None:
        self._store, self._run, self._task = store, run, task
        self._begin()

    def __enter__(self) -> KnownWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._staging is not None:
            with contextlib.suppress(_Abandoned):
                self._staging.__exit__(_Abandoned, _Abandoned(), None)

    def _begin(self) -> None:
        # The random end is for object stores, which have no locks: two runs may take the same number there.
        self._name = f"{self._run:06d}-{self._task:04d}-{secrets.token_hex(4)}"
        self._rows: list[dict[str, Any]] = []
        self._staging: contextlib.AbstractContextManager[IO[bytes]] | None = None
        self._pack: IO[bytes] | None = None
        self._size = 0
        self._began = time.monotonic()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, result: Result, *, max_bytes: int) -> None:
        """Add a body, or a verdict without one; `max_bytes` is the limit that a body too large exceeded."""
        row = {"offset": 0, "bytes": max_bytes if result.reason is Reason.fetch_too_large else 0, "xxh3": NO_HASH}
        if result.reason is None:
            body = result.body or b""
            if self._pack is None:
                self._staging = publish(join(self._store, "packs", f"{self._name}.pack"))
                self._pack = self._staging.__enter__()
            self._pack.write(body)
            row |= {"pack": f"{self._name}.pack", "offset": self._size, "bytes": len(body), "xxh3": xxh3(body)}
            self._size += len(body)
        self._add(result, row)

    def add_unchanged(self, result: Result, entry: Entry) -> None:
        """Add a body that has not changed, according to its server, and lies at `entry`."""
        self._add(result, {"pack": entry.pack, "offset": entry.offset, "bytes": entry.size, "xxh3": entry.xxh3})

    def _add(self, result: Result, row: dict[str, Any]) -> None:
        if not self._rows:
            self._began = time.monotonic()
        row |= {
            "url_hash": url_hashes([result.url]).tobytes(),
            "url": result.url.encode("utf-8", "replace").decode(),
            "reason": None if result.reason is None else str(result.reason),
            "detail": result.detail.encode("utf-8", "replace").decode(),
            "status": result.status,
            "etag": result.etag,
            "last_modified": result.last_modified,
            "run": self._run,
            "time": time.time_ns() // 1_000_000,
        }
        self._rows.append(row)

    def seconds_left(self) -> float | None:
        """Until the collected results should be published; None while there are none."""
        return max(0.0, self._began + SECONDS_PER_TABLE - time.monotonic()) if self._rows else None

    def is_due(self) -> bool:
        """Whether there is enough to publish, or it has waited long enough."""
        enough = len(self._rows) >= RESULTS_PER_TABLE or self._size >= BYTES_PER_PACK
        return enough or self.seconds_left() == 0.0

    def publish(self) -> int:
        """Publish the pack, and then its table, so that no table ever names a missing pack; return the results."""
        if self._staging is not None:
            staging, self._staging = self._staging, None
            staging.__exit__(None, None, None)
        with publish(join(self._store, "known", f"{self._name}.parquet")) as stream:
            pq.write_table(pa.Table.from_pylist(self._rows, KNOWN), stream, compression="zstd")
        number = len(self._rows)
        self._begin()
        return number


class _Abandoned(Exception):  # noqa: N818 - control flow: makes `publish` drop its staging file
    pass


def xxh3(data: bytes) -> bytes:
    """The 16-byte hash of bodies and URLs."""
    return xxhash.xxh3_128_digest(data)


def url_hashes(urls: Iterable[str]) -> Keys:
    """The keys of URLs as written, (urls, 2)."""
    # A lone surrogate, which a damaged source may have, is hashed like any other character.
    hashes = b"".join(xxh3(url.encode("utf-8", "surrogatepass")) for url in urls)
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)


def next_run(store: str) -> int:
    """A number for a run with newer rows than all that are there."""
    _, tables = _list_tables(store)
    return 1 + max((int(path.rpartition("/")[2].partition("-")[0]) for path in tables), default=0)


def published_by(store: str, run: int, task: int) -> set[bytes]:
    """The hashes (16 bytes) of the URLs that a task of a run has published."""
    system, all_paths = _list_tables(store)
    paths = [path for path in all_paths if path.rpartition("/")[2].startswith(f"{run:06d}-{task:04d}-")]
    tables = (pq.read_table(path, columns=["url_hash"], filesystem=system) for path in paths)
    return {url_hash for table in tables for url_hash in table[0].to_pylist()}


def remove_strays(store: str) -> None:
    """Delete what killed tasks left: staging files, and packs without a table."""
    system, tables = _list_tables(store)
    named = {path.rpartition("/")[2].removesuffix(".parquet") for path in tables}
    for folder in ("packs", "known"):
        _, path = filesystem(join(store, folder))
        for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            stray = info.base_name.startswith(".staging-") or (
                NAME.fullmatch(info.base_name) and info.base_name.partition(".")[0] not in named
            )
            if stray and info.is_file and time.time_ns() - (info.mtime_ns or 0) > STRAY_SECONDS * 1e9:
                system.delete_file(info.path)


def _list_tables(uri: str) -> tuple[Any, list[str]]:
    """The file system and the paths of the published tables, in the order of their names."""
    system, path = filesystem(join(uri, "known"))
    infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return system, sorted(info.path for info in infos if NAME.fullmatch(info.base_name))
