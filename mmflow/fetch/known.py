"""What is known of each URL, on disk: packs of bytes, and tables that say what lies where or why there is nothing.

    <store>/packs/<run>-<task>-….pack      bodies, one after another
    <store>/known/<run>-<task>-….parquet   rows of KNOWN; published after its pack, so whatever it names is there

Files are only ever added, each whole or absent: a killed fetch leaves whole knowledge, and at most a pack without a
table, which a later run clears away.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from mmflow.core.storage import filesystem, join, publish
from mmflow.fetch.client import Result
from mmflow.sources.reasons import Reason

# A kill loses no more than this of a task's work; smaller packs would make many files, and tables slow to open.
RESULTS_PER_TABLE = 1_000
BYTES_PER_PACK = 256 << 20
SECONDS_PER_TABLE = 30.0
# A pack without a table is a killed task's once it is so old: a live task publishes the table seconds after its pack.
STRAY_SECONDS = 3_600.0

# `reason` is null where there is a body; then `pack`, `offset`, `bytes` and `xxh3` say where it lies, else they are
# null, 0 and zeros, but for fetch_too_large: its `bytes` is the bound that the body broke. The newest row of a URL
# counts, by `run` and then by `time` (milliseconds since 1970). `detail` repeats no query string; `url` is as written.
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

Keys = npt.NDArray[np.uint64]  # (n, 2): hashes as two integers, which sort ten times faster than their 16 bytes


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
        # Random at the end: on an object store, which has no locks, two runs may take the same number.
        self._name = f"{self._run:06d}-{self._task:04d}-{secrets.token_hex(4)}"
        self._rows: list[dict[str, Any]] = []
        self._staging: contextlib.AbstractContextManager[IO[bytes]] | None = None
        self._pack: IO[bytes] | None = None
        self._size = 0
        self._began = time.monotonic()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, result: Result, *, max_bytes: int) -> None:
        """A body, or a verdict without one; `max_bytes` is the bound that a body too large has broken."""
        body = result.body or b""
        row = {
            "reason": None if result.reason is None else str(result.reason),
            "offset": 0,
            "bytes": 0,
            "xxh3": NO_HASH,
        }
        if result.reason is Reason.fetch_too_large:
            row["bytes"] = max_bytes
        elif result.reason is None:
            if self._pack is None:
                self._staging = publish(join(self._store, "packs", f"{self._name}.pack"))
                self._pack = self._staging.__enter__()
            self._pack.write(body)
            row |= {"pack": f"{self._name}.pack", "offset": self._size, "bytes": len(body), "xxh3": xxh3(body)}
            self._size += len(body)
        self._add(result, row)

    def add_unchanged(self, result: Result, *, pack: str, offset: int, size: int, body_hash: bytes) -> None:
        """A body that its server says is still the one that lies there."""
        self._add(result, {"reason": None, "pack": pack, "offset": offset, "bytes": size, "xxh3": body_hash})

    def seconds_left(self) -> float | None:
        """Until what is collected should be published; None while there is nothing."""
        return max(0.0, self._began + SECONDS_PER_TABLE - time.monotonic()) if self._rows else None

    def is_due(self) -> bool:
        """Whether there is enough to publish, or it has waited long enough."""
        enough = len(self._rows) >= RESULTS_PER_TABLE or self._size >= BYTES_PER_PACK
        return enough or self.seconds_left() == 0.0

    def publish(self) -> int:
        """Publish the pack, and then the table that names it, so that no table ever names what is not there."""
        if self._staging is not None:
            staging, self._staging = self._staging, None
            staging.__exit__(None, None, None)
        with publish(join(self._store, "known", f"{self._name}.parquet")) as stream:
            pq.write_table(pa.Table.from_pylist(self._rows, KNOWN), stream, compression="zstd")
        number = len(self._rows)
        self._begin()
        return number

    def _add(self, result: Result, row: dict[str, Any]) -> None:
        if not self._rows:
            self._began = time.monotonic()
        self._rows.append(
            row
            | {
                "url_hash": url_hashes([result.url]).tobytes(),
                "url": result.url.encode("utf-8", "replace").decode(),
                "detail": result.detail.encode("utf-8", "replace").decode(),
                "status": result.status,
                "etag": result.etag,
                "last_modified": result.last_modified,
                "run": self._run,
                "time": time.time_ns() // 1_000_000,
            }
        )


class _Abandoned(Exception):  # noqa: N818 - control flow: makes `publish` drop its staging file
    pass


def xxh3(data: bytes) -> bytes:
    """The 16 bytes by which bodies and URLs are known."""
    return xxhash.xxh3_128_digest(data)


def url_hashes(urls: Iterable[str]) -> Keys:
    """The keys of URLs as written, (urls, 2)."""
    # A lone surrogate, which a damaged source may hold, is hashed like any other character.
    hashes = b"".join(xxh3(url.encode("utf-8", "surrogatepass")) for url in urls)
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)


def list_tables(uri: str) -> tuple[Any, list[str]]:
    """The file system and the paths of the published tables, in the order of their names."""
    from pyarrow import fs

    system, path = filesystem(join(uri, "known"))
    infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return system, sorted(info.path for info in infos if NAME.fullmatch(info.base_name))


def next_run(store: str) -> int:
    """The number of the next run: its rows are newer than all that are there."""
    _, tables = list_tables(store)
    return 1 + max((int(path.rpartition("/")[2].partition("-")[0]) for path in tables), default=0)


def published_by(store: str, run: int, task: int) -> set[bytes]:
    """The hashes (16 bytes) of the URLs that a task of a run has published."""
    system, tables = list_tables(store)
    mine = [path for path in tables if path.rpartition("/")[2].startswith(f"{run:06d}-{task:04d}-")]
    return {key for path in mine for key in pq.read_table(path, columns=["url_hash"], filesystem=system)[0].to_pylist()}


def remove_strays(store: str) -> None:
    """Delete what killed tasks left: staging files, and packs whose table was never published."""
    from pyarrow import fs

    system, tables = list_tables(store)
    named = {path.rpartition("/")[2].removesuffix(".parquet") for path in tables}
    for folder in ("packs", "known"):
        _, path = filesystem(join(store, folder))
        for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            stray = info.base_name.startswith(".staging-") or (
                NAME.fullmatch(info.base_name) and info.base_name.partition(".")[0] not in named
            )
            if stray and info.is_file and time.time_ns() - (info.mtime_ns or 0) > STRAY_SECONDS * 1e9:
                system.delete_file(info.path)
