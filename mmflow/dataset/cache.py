"""Remote shards on a node's own disk: each fetched once for all processes, whole and verified, within a size limit.

The directory's files are its whole state, so a kill -9 leaves nothing to repair. `<checksum>.tar` is a verified shard.
Its readers hold a shared flock on it; only shards that nobody holds are deleted, the least recently read first.
`<checksum>.part` is a download. It has its full size from the start, which reserves its space, and an exclusive flock
that others wait for. The kernel drops the locks of a dead process, and anybody may then delete its part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import xxhash

from mmflow.core.errors import CorruptArtifactError, CorruptShardError, MisuseError, MmflowError
from mmflow.dataset.config import ShardCacheConfig
from mmflow.dataset.tar import READ_BYTES, read_blocks

NAME = re.compile(r"[0-9a-f]{32}\.(tar|part)")  # other files in the directory are neither counted nor deleted
ATTEMPTS = 3
BACKOFF_SECONDS = 1.0  # before the second attempt; four times as long before the third
IDLE_SECONDS = 10.0  # a shard that was not read for this long may be deleted
SHORTAGE_SECONDS = 60.0  # how long to wait while others read everything in the cache
POLL_SECONDS = 0.1


def node_cache(config: ShardCacheConfig) -> ShardCache:
    """The cache that a recipe asks for. Nothing is written until a shard is fetched."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = Path(config.directory).expanduser() if config.directory else home / "mmflow" / "shards"
    return ShardCache(directory.absolute(), config.max_bytes)


class ShardCache:
    """Whole shards in a directory that all processes of a node share. Safe between threads, processes and kills.

    `max_bytes` limits the shards and the downloads together. The directory must be on a local disk: on a network file
    system, a process loses its lock on a file when the first of its descriptors is closed.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._shards: weakref.WeakSet[CachedShard] = weakref.WeakSet()
        self._guard = threading.Lock()
        self._sweeper: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int]]:
        return ShardCache, (self.directory, self.max_bytes)

    def shard(self, uri: str, checksum: str, size: int) -> CachedShard:
        """The shard of `size` bytes at `uri`, fetched when it is first read. `checksum`: its xxh3_128 (hex)."""
        if size > self.max_bytes:
            raise MisuseError(
                f"loader.cache.max_bytes: {self.max_bytes}, but {uri} alone has {size} bytes; allow for several of them"
            )
        shard = CachedShard(self, uri, checksum, size)
        with self._guard:
            self._shards.add(shard)
        return shard

    def release_idle(self, seconds: float) -> None:
        """Release this process's shards that were not read for `seconds`. They stay, but may be deleted."""
        with self._guard:
            shards = list(self._shards)
        for shard in shards:
            shard.release(seconds)

    def open(self, uri: str, checksum: str, size: int) -> Copy:
        """A verified copy, held open; fetched now if there is none. Raises as `CachedShard.open`."""
        with self._guard:
            if self._sweeper is None:
                self._sweeper = threading.Thread(
                    target=_sweep, args=(weakref.ref(self),), name="mmflow-cache", daemon=True
                )
                self._sweeper.start()
        with self._naming_directory():
            self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            with self._naming_directory(), contextlib.suppress(FileNotFoundError):
                copy = Copy(os.open(self.directory / f"{checksum}.tar", os.O_RDONLY))
                fcntl.flock(copy.descriptor, fcntl.LOCK_SH)
                if os.fstat(copy.descriptor).st_nlink:  # else it was deleted between the two calls
                    return copy
            self._fetch(uri, checksum, size)

    def _fetch(self, uri: str, checksum: str, size: int) -> None:
        """Bring the shard here, or wait until another process or thread has."""
        part, path = self.directory / f"{checksum}.part", self.directory / f"{checksum}.tar"
        with self._naming_directory():
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._wait(descriptor)
                return
            if not _is_at(descriptor, part):  # it belonged to another process, which finished or was cleaned up after
                return
            try:
                if not path.exists():
                    os.ftruncate(descriptor, 0)  # a killed process may have left something
                    self._reserve(uri, descriptor, part, size)
                    self._download(uri, checksum, size, descriptor)
                    with self._naming_directory(), contextlib.suppress(FileNotFoundError):  # the user emptied it
                        os.fdatasync(descriptor)  # or a power cut leaves a shard of zeros under a valid name
                        os.rename(part, path)
            finally:
                with contextlib.suppress(OSError):
                    if _is_at(descriptor, part):
                        part.unlink()
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int) -> None:
        """Wait until another's download ends: a shared lock is then available, even if others hold the shard."""
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if not os.fstat(descriptor).st_size:  # it has no room yet, and may wait for what this process holds
                    self.release_idle(0)
                time.sleep(POLL_SECONDS)

    def _download(self, uri: str, checksum: str, size: int, descriptor: int) -> None:
        """Copy and verify. A broken connection, or a byte that flips on the way, leads to another attempt."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF_SECONDS * 4 ** (attempt - 1))
            cause: OSError | None = None
            try:
                received = self._receive(uri, size, descriptor)
            except OSError as error:
                cause = error
                failure = MmflowError(f"{uri}: cannot be fetched ({error}); fix the cause and run again")
                continue
            if received == (size, checksum):
                return
            failure = CorruptShardError(
                f"{uri}: {received[0]} bytes, {received[1]}; the manifest has {size} bytes, {checksum}: it was altered "
                "after its commit; run `mmflow verify` on its dataset"
            )
        raise failure from cause

    def _receive(self, uri: str, size: int, descriptor: int) -> tuple[int, str]:
        """(bytes, xxh3_128) of what arrived."""
        digest, place = xxhash.xxh3_128(), 0
        for block in read_blocks(uri, READ_BYTES):
            digest.update(block)
            with self._naming_directory():
                while block and place < size:
                    written = os.pwrite(descriptor, block, place)
                    block, place = block[written:], place + written
            place += len(block)
        return place, digest.hexdigest()

    def _reserve(self, uri: str, descriptor: int, part: Path, size: int) -> None:
        """Give the part its full size, once there is room for it."""
        began = time.monotonic()
        while (arriving := self._make_room(descriptor, part, size)) is not None:
            if arriving:  # others' downloads will end, and may be deleted then
                began = time.monotonic()
            elif time.monotonic() - began > SHORTAGE_SECONDS:
                raise MmflowError(
                    f"loader.cache.max_bytes: the {self.max_bytes} bytes in {self.directory} are all being read, and "
                    f"{uri} needs {size} more; raise it"
                )
            time.sleep(POLL_SECONDS)
            self.release_idle(0)

    def _make_room(self, descriptor: int, part: Path, size: int) -> int | None:
        """None once the space is reserved; else the bytes that others have reserved for their downloads."""
        with self._naming_directory():
            lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                arriving = 0
                for other in self._files(".part"):
                    if other != part and not _delete_unheld(other):
                        arriving += _size_of(other)
                shards = self._files(".tar")
                total = arriving + sum(map(_size_of, shards))
                while True:
                    if total + size <= self.max_bytes:
                        try:
                            os.posix_fallocate(descriptor, 0, size)
                            return None
                        except OSError as error:
                            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not total:
                                raise
                            os.ftruncate(descriptor, 0)  # some of the space may have been allocated
                    if not shards:
                        return arriving
                    oldest = shards.pop(0)
                    freed = _size_of(oldest)
                    total -= freed if _delete_unheld(oldest) else 0
            finally:
                os.close(lock)

    def _files(self, extension: str) -> list[Path]:
        """The cache's files of a kind, the least recently read first."""
        files = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and entry.name.endswith(extension):
                    with contextlib.suppress(FileNotFoundError):
                        files.append((entry.stat().st_mtime_ns, entry.path))
        return [Path(path) for _, path in sorted(files)]

    @contextlib.contextmanager
    def _naming_directory(self) -> Iterator[None]:
        """Turn an error of the directory's file system into one line that names the recipe's key."""
        try:
            yield
        except OSError as error:
            raise MmflowError(
                f"loader.cache.directory: {self.directory}: {error.strerror}; name a directory on a local disk that "
                f"is writable and has room for loader.cache.max_bytes ({self.max_bytes}), or lower that"
            ) from error


class CachedShard:
    """One shard of a cache, held open while it is being read."""

    def __init__(self, cache: ShardCache, uri: str, checksum: str, size: int) -> None:
        self.cache = cache
        self.uri = uri
        self.checksum = checksum
        self.size = size
        self._copy: Copy | None = None

    def open(self) -> Copy:
        """Fetch the shard unless it is here, and hold it until it has been idle for a while.

        Raises MissingArtifactError if it is gone, CorruptArtifactError if it is not what was committed, MmflowError if
        it cannot be fetched or stored.
        """
        copy = self._copy
        if copy is None:
            self._copy = copy = self.cache.open(self.uri, self.checksum, self.size)
        return copy

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes at `offset`. Raises as `open`."""
        copy = self._copy or self.open()  # a reference of our own: another thread may release the shard's
        copy.used = time.time()
        try:
            return os.pread(copy.descriptor, size, offset)
        except OSError as error:
            raise CorruptArtifactError(
                f"{self.uri}: byte {offset} of its copy in {self.cache.directory} cannot be read ({error.strerror})"
            ) from error

    def prepare(self, offset: int, size: int) -> None:
        """Fetch the shard unless it is here, and have these bytes read into memory. Raises as `open`."""
        os.posix_fadvise(self.open().descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def release(self, seconds: float) -> None:
        """Release the copy unless it was read within `seconds`."""
        copy = self._copy
        if copy is not None and time.time() - copy.used >= seconds:
            self._copy = None

    def discard_if_altered(self) -> bool:
        """Whether the copy is no longer what was verified. It is then deleted, and the next read fetches it again."""
        copy = self.open()
        digest = xxhash.xxh3_128()
        with contextlib.suppress(OSError):  # a failing disk: the hash differs then too
            for place in range(0, self.size, READ_BYTES):
                digest.update(os.pread(copy.descriptor, READ_BYTES, place))
        if digest.hexdigest() == self.checksum:
            return False
        path = self.cache.directory / f"{self.checksum}.tar"
        if _is_at(copy.descriptor, path):
            path.unlink(missing_ok=True)
        self._copy = None
        return True


class Copy:
    """An open file. Its shared lock, which keeps it from deletion, ends with the last reference."""

    __slots__ = ("descriptor", "used")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.used = time.time()
        self._touch()

    def __del__(self) -> None:
        self._touch()
        os.close(self.descriptor)

    def _touch(self) -> None:
        with contextlib.suppress(OSError):  # for another user's file: it will seem unread for longer than it is
            os.utime(self.descriptor, (self.used, self.used))


def _sweep(cache: weakref.ref[ShardCache]) -> None:
    """Release idle shards for as long as the cache exists, so that a process that does other things blocks none."""
    while (alive := cache()) is not None:
        alive.release_idle(IDLE_SECONDS)
        del alive
        time.sleep(IDLE_SECONDS / 2)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one with this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _size_of(path: Path) -> int:
    """In bytes; 0 for a file that is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _delete_unheld(path: Path) -> bool:
    """Delete a file unless somebody holds a lock on it; return whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):  # else another file has this name by now
            path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
