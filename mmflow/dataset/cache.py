"""Remote shards on a node's own disk: each fetched once for all processes, whole and verified, within a bound.

The directory's files are its whole state, so that a kill -9 leaves nothing to mend. `<checksum>.tar` is a verified
shard; who reads it holds a shared flock on it, and only a shard that nobody holds is deleted, the longest unread first.
`<checksum>.part` is a download; it has its full size from the start, which reserves its space, and an exclusive flock,
on which others wait. The kernel drops a dead process's locks: its part is then anybody's to delete.
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
from mmflow.dataset.held import Copy, delete_unheld, is_at, size_of
from mmflow.dataset.members import READ_BYTES, read_blocks

NAME = re.compile(r"[0-9a-f]{32}\.(tar|part)")  # other files in the directory are not ours to count or delete
ATTEMPTS = 3
BACKOFF_SECONDS = 1.0  # before the second attempt, and four times that before the third
IDLE_SECONDS = 10.0  # after which an open shard that nobody reads may be deleted
SHORTAGE_SECONDS = 60.0  # how long to wait while others read all that the cache holds
POLL_SECONDS = 0.1


def node_cache(config: ShardCacheConfig) -> ShardCache:
    """The cache that a recipe asks for. Nothing is written until a shard is fetched."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = Path(config.directory).expanduser() if config.directory else home / "mmflow" / "shards"
    return ShardCache(directory.absolute(), config.max_bytes)


class ShardCache:
    """Whole shards in a directory that all processes of a node share. Safe between threads, processes and kills.

    `max_bytes` bounds the shards there and those on their way together. The directory must be on a local disk: on a
    network file system, a process loses its lock on a file with the first of its descriptors that is closed.
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
        """The shard of `size` bytes at `uri`, fetched when it is first read. `checksum`: xxh3_128 (hex) of it all."""
        if size > self.max_bytes:
            raise MisuseError(
                f"loader.cache.max_bytes: {self.max_bytes}, but {uri} alone has {size} bytes; allow for several of them"
            )
        found = CachedShard(self, uri, checksum, size)
        with self._guard:
            self._shards.add(found)
        return found

    def release_idle(self, seconds: float = IDLE_SECONDS) -> None:
        """Let go of this process's shards that nobody has read for so long: they stay, but may be deleted."""
        with self._guard:
            shards = list(self._shards)
        for shard in shards:
            shard.release(seconds)

    def open(self, uri: str, checksum: str, size: int) -> Copy:
        """A verified copy, held open; fetched now if there is none. Raises as `CachedShard.open`."""
        with self._guard:
            if self._sweeper is None:
                self._sweeper = threading.Thread(
                    target=sweep, args=(weakref.ref(self),), name="mmflow-cache", daemon=True
                )
                self._sweeper.start()
        with self._naming():
            self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            with self._naming(), contextlib.suppress(FileNotFoundError):
                copy = Copy(os.open(self.directory / f"{checksum}.tar", os.O_RDONLY))
                fcntl.flock(copy.descriptor, fcntl.LOCK_SH)
                if os.fstat(copy.descriptor).st_nlink:  # else it was deleted between the two calls
                    return copy
            self._fetch(uri, checksum, size)

    def _fetch(self, uri: str, checksum: str, size: int) -> None:
        """Bring the shard here, or wait until another process or thread has."""
        part, path = self.directory / f"{checksum}.part", self.directory / f"{checksum}.tar"
        with self._naming():
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._wait(descriptor)
                return
            if not is_at(descriptor, part):  # it was another's, who has finished or was cleaned up after
                return
            try:
                if not path.exists():
                    os.ftruncate(descriptor, 0)  # a killed process's leftover
                    self._reserve(uri, descriptor, part, size)
                    self._download(uri, checksum, size, descriptor)
                    with self._naming(), contextlib.suppress(FileNotFoundError):  # the user emptied the directory
                        os.fdatasync(descriptor)  # or a power cut leaves a shard of zeros under a good name
                        os.rename(part, path)
            finally:
                with contextlib.suppress(OSError):
                    if is_at(descriptor, part):
                        part.unlink()
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int) -> None:
        """Until another's download ends: a shared lock is to be had then, though others hold the shard already."""
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if not os.fstat(descriptor).st_size:  # it has no room yet, and may wait for what this process holds
                    self.release_idle(0)
                time.sleep(POLL_SECONDS)

    def _download(self, uri: str, checksum: str, size: int, descriptor: int) -> None:
        """Copy and verify; a connection that breaks, or a byte that flips on its way, has further attempts."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF_SECONDS * 4 ** (attempt - 1))
            cause: OSError | None = None
            try:
                found = self._receive(uri, size, descriptor)
            except OSError as error:
                cause, wrong = error, MmflowError(f"{uri}: cannot be fetched ({error}); mend it and run again")
                continue
            if found == (size, checksum):
                return
            wrong = CorruptShardError(
                f"{uri}: {found[0]} bytes, {found[1]}; the manifest has {size} bytes, {checksum}: it was altered after "
                "its commit; run `mmflow verify` on its dataset"
            )
        raise wrong from cause

    def _receive(self, uri: str, size: int, descriptor: int) -> tuple[int, str]:
        """(bytes, xxh3_128) of what came."""
        digest, place = xxhash.xxh3_128(), 0
        for block in read_blocks(uri, READ_BYTES):
            digest.update(block)
            with self._naming():
                while block and place < size:
                    written = os.pwrite(descriptor, block, place)
                    block, place = block[written:], place + written
            place += len(block)
        return place, digest.hexdigest()

    def _reserve(self, uri: str, descriptor: int, part: Path, size: int) -> None:
        """Give the part its full size, once there is room for it."""
        began = time.monotonic()
        while (coming := self._make_room(descriptor, part, size)) is not None:
            if coming:  # others' downloads will end, and may then be deleted
                began = time.monotonic()
            elif time.monotonic() - began > SHORTAGE_SECONDS:
                raise MmflowError(
                    f"loader.cache.max_bytes: the {self.max_bytes} bytes in {self.directory} are all being read, and "
                    f"{uri} needs {size} more; raise it"
                )
            time.sleep(POLL_SECONDS)
            self.release_idle(0)

    def _make_room(self, descriptor: int, part: Path, size: int) -> int | None:
        """None once the space is reserved; else the bytes that others have reserved for what they download."""
        with self._naming():
            lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                coming = 0
                for other in self._files(".part"):
                    if other != part and not delete_unheld(other):
                        coming += size_of(other)
                shards = self._files(".tar")
                total = coming + sum(map(size_of, shards))
                while True:
                    if total + size <= self.max_bytes:
                        try:
                            os.posix_fallocate(descriptor, 0, size)
                            return None
                        except OSError as error:
                            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not total:
                                raise
                            os.ftruncate(descriptor, 0)  # a part of the space may have been had
                    if not shards:
                        return coming
                    oldest = shards.pop(0)
                    freed = size_of(oldest)
                    total -= freed if delete_unheld(oldest) else 0
            finally:
                os.close(lock)

    def _files(self, extension: str) -> list[Path]:
        """Our files of a kind, the longest unread first."""
        found = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and entry.name.endswith(extension):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime_ns, entry.path))
        return [Path(path) for _, path in sorted(found)]

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn what the directory's own file system refuses into one line that names the recipe's key."""
        try:
            yield
        except OSError as error:
            raise MmflowError(
                f"loader.cache.directory: {self.directory}: {error.strerror}; name a directory on a local disk that "
                f"can be written to and has room for loader.cache.max_bytes ({self.max_bytes}), or lower that"
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

        Raises MissingArtifactError where it is gone, CorruptArtifactError where it is not what was committed,
        MmflowError where it cannot be fetched or kept.
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
        """Fetch the shard unless it is here, and have these bytes of it read into memory. Raises as `open`."""
        os.posix_fadvise(self.open().descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def release(self, seconds: float) -> None:
        """Let go of the copy unless it was read within so many seconds."""
        copy = self._copy
        if copy is not None and time.time() - copy.used >= seconds:
            self._copy = None

    def mend(self) -> bool:
        """Whether the copy is no longer what was verified. It is then deleted, and the next read fetches it anew."""
        copy = self.open()
        digest = xxhash.xxh3_128()
        with contextlib.suppress(OSError):  # a disk that fails: the hash is then another too
            for place in range(0, self.size, READ_BYTES):
                digest.update(os.pread(copy.descriptor, READ_BYTES, place))
        if digest.hexdigest() == self.checksum:
            return False
        path = self.cache.directory / f"{self.checksum}.tar"
        if is_at(copy.descriptor, path):
            path.unlink(missing_ok=True)
        self._copy = None
        return True


def sweep(cache: weakref.ref[ShardCache]) -> None:
    """Release what is idle, as long as there is a cache: a process that does other things for an hour blocks none."""
    while (found := cache()) is not None:
        found.release_idle()
        del found
        time.sleep(IDLE_SECONDS / 2)
