"""The shard cache of a node: each shard is fetched and verified once, within a limit, despite kills and full disks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError, MmflowError
from mmflow.dataset import cache as caching
from mmflow.dataset.cache import CachedShard, ShardCache, node_cache
from mmflow.dataset.config import ShardCacheConfig
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Reader
from tests.dataset.handmade import edit_index, wait_until

SHARD_BYTES = 3_000_000

# Reads one shard like another process of the node. Each fetch writes a line to a log and then waits.
CHILD = """
import sys, time
from pathlib import Path
from mmflow.dataset import cache as caching

uri, checksum, size, directory, log, seconds = sys.argv[1:]
blocks = caching.read_blocks

def slow(uri, size):
    for number, block in enumerate(blocks(uri, size)):
        yield block
        if number == 0:
            with open(log, "a") as lines:
                lines.write("fetched\\n")
            time.sleep(float(seconds))

caching.read_blocks = slow
shard = caching.ShardCache(Path(directory), 100_000_000).shard(uri, checksum, int(size))
print(len(shard.read(10, 0)), flush=True)
"""


class Store:
    """Remote shards: files behind fsspec, which the cache can only stream."""

    def __init__(self, directory: Path, max_bytes: int = 100_000_000) -> None:
        self.directory = directory
        self.kept = directory / "cache"
        self.cache = ShardCache(self.kept, max_bytes)
        self.bodies: dict[int, bytes] = {}

    def shard(self, number: int, size: int = SHARD_BYTES, cache: ShardCache | None = None) -> CachedShard:
        body = self.bodies.setdefault(number, os.urandom(size))
        path = self.directory / f"{number}.tar"
        if not path.exists():
            path.write_bytes(body)
        checksum = xxhash.xxh3_128_hexdigest(body)
        return (cache or self.cache).shard(f"fsspec+file://{path}", checksum, len(body))

    def holds(self, number: int) -> bool:
        return (self.kept / f"{xxhash.xxh3_128_hexdigest(self.bodies[number])}.tar").exists()

    def files(self) -> list[str]:
        return sorted(path.suffix for path in self.kept.iterdir() if path.name != ".lock")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(caching, "BACKOFF_SECONDS", 0.0)
    return Store(tmp_path)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fetched URIs, in order."""
    uris: list[str] = []
    blocks = caching.read_blocks

    def read_blocks(uri: str, size: int) -> Iterator[memoryview]:
        uris.append(uri)
        return blocks(uri, size)

    monkeypatch.setattr(caching, "read_blocks", read_blocks)
    return uris


Start = Callable[[Store, int, float], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts another process that reads a shard and takes this many seconds to fetch it."""
    children: list[subprocess.Popen[str]] = []

    def started(store: Store, number: int, seconds: float) -> subprocess.Popen[str]:
        shard, log = store.shard(number), store.directory / "log"
        arguments = [shard.uri, shard.checksum, str(shard.size), str(store.kept), str(log), str(seconds)]
        children.append(subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield started
    for child in children:
        child.kill()
        child.wait()


def test_a_shard_is_fetched_once_and_read_unchanged(store: Store, fetched: list[str]) -> None:
    shard = store.shard(0)
    assert not store.kept.exists()  # nothing is written before it is needed
    for offset, size in ((0, 10), (SHARD_BYTES // 2, 100_000), (len(store.bodies[0]) - 5, 50)):
        assert shard.read(size, offset) == store.bodies[0][offset : offset + size]
    assert store.shard(0).read(7, 3) == store.bodies[0][3:10]
    assert store.shard(0, cache=ShardCache(store.kept, 1 << 30)).read(7, 3) == store.bodies[0][3:10]
    assert fetched == [shard.uri]
    assert store.files() == [".tar"]


def test_concurrent_threads_fetch_a_shard_once(store: Store, fetched: list[str]) -> None:
    shards = [store.shard(number % 2) for number in range(16)]
    with ThreadPoolExecutor(16) as threads:
        bodies = list(threads.map(lambda shard: shard.read(64, 128), shards))
    assert bodies == [store.bodies[number % 2][128:192] for number in range(16)]
    assert sorted(fetched) == sorted({shard.uri for shard in shards})


def test_concurrent_processes_fetch_a_shard_once(store: Store, start: Start) -> None:
    children = [start(store, 0, 1.0) for _ in range(3)]
    assert [child.communicate(timeout=60)[0] for child in children] == ["10\n"] * 3
    assert (store.directory / "log").read_text() == "fetched\n"
    assert store.files() == [".tar"]


def test_the_download_of_a_killed_process_is_taken_over(store: Store, start: Start, fetched: list[str]) -> None:
    child = start(store, 0, 600)
    wait_until((store.directory / "log").exists)
    (part,) = store.kept.glob("*.part")
    assert part.stat().st_size == len(store.bodies[0])  # its space is reserved before it is fetched
    waiting = threading.Thread(target=lambda: store.shard(0).read(1, 0))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()  # another process is fetching it
    assert fetched == []
    child.send_signal(signal.SIGKILL)
    child.wait()
    waiting.join(30)
    assert not waiting.is_alive()
    assert store.shard(0).read(9, 9) == store.bodies[0][9:18]
    assert len(fetched) == 1
    assert store.files() == [".tar"]


def test_the_next_download_deletes_parts_of_killed_processes(store: Store, start: Start) -> None:
    child, alive = start(store, 0, 600), start(store, 1, 600)
    log = store.directory / "log"
    wait_until(lambda: log.exists() and log.read_text().count("fetched") == 2)
    child.kill()
    child.wait()
    assert store.files() == [".part", ".part"]
    store.shard(2).read(1, 0)
    assert store.files() == [".part", ".tar"]
    (part,) = store.kept.glob("*.part")
    assert part.stem == store.shard(1).checksum  # the part of the live process stays
    assert alive.poll() is None


def test_a_changed_shard_is_refused_and_not_cached(store: Store, fetched: list[str]) -> None:
    shard = store.shard(0)
    path = store.directory / "0.tar"
    body = bytearray(store.bodies[0])
    body[1_000_000] ^= 1
    for altered in (bytes(body), store.bodies[0][:-512], store.bodies[0] + bytes(512), b""):
        path.write_bytes(altered)
        with pytest.raises(CorruptArtifactError, match=rf"0\.tar: {len(altered)} bytes.*{shard.size}"):
            shard.read(1, 0)
        assert store.files() == []
    assert len(fetched) == 4 * caching.ATTEMPTS  # retried because it could be a network fault
    path.unlink()
    with pytest.raises(MissingArtifactError, match=r"0\.tar: no such file"):
        shard.read(1, 0)
    assert len(fetched) == 4 * caching.ATTEMPTS + 1
    path.write_bytes(store.bodies[0])
    assert shard.read(4, 0) == store.bodies[0][:4]


@pytest.mark.parametrize("fault", ["breaks", "flips"])
def test_a_failed_connection_is_retried(store: Store, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    attempts: list[str] = []
    blocks = caching.read_blocks

    def flaky(uri: str, size: int) -> Iterator[memoryview]:
        attempts.append(uri)
        for number, block in enumerate(blocks(uri, 1 << 20)):
            if number == 1 and len(attempts) == 1:
                if fault == "breaks":
                    raise ConnectionResetError("reset by peer")
                block[0] ^= 1
            yield block

    monkeypatch.setattr(caching, "read_blocks", flaky)
    assert store.shard(0).read(1 << 22, 0) == store.bodies[0]
    assert len(attempts) == 2


def test_the_error_of_an_unreachable_store_names_the_shard(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str, size: int) -> Iterator[memoryview]:
        raise TimeoutError("timed out")
        yield memoryview(b"")

    shard = store.shard(0)
    monkeypatch.setattr(caching, "read_blocks", broken)
    with pytest.raises(MmflowError, match=r"0\.tar: cannot be fetched \(timed out\)"):
        shard.read(1, 0)
    assert store.files() == []


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_the_least_recently_read_shard_is_deleted_first(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=3 * SHARD_BYTES)
    for number in (0, 1, 2, 0):
        store.shard(number).read(1, 0)
        store.cache.release_idle(0)
        time.sleep(0.02)
    (store.kept / "notes.tar").write_bytes(bytes(SHARD_BYTES))  # a foreign file: neither counted nor deleted
    store.shard(3).read(1, 0)
    assert [store.holds(number) for number in range(4)] == [True, False, True, True]
    store.cache.release_idle(0)
    store.shard(4).read(1, 0)
    assert [store.holds(number) for number in range(5)] == [True, False, False, True, True]
    assert (store.kept / "notes.tar").exists()


def test_a_shard_that_another_process_reads_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHORTAGE_SECONDS", 0.5)
    store = Store(tmp_path, max_bytes=2 * SHARD_BYTES)
    other = ShardCache(store.kept, 2 * SHARD_BYTES)  # has its own locks, like another process
    held = store.shard(0, cache=other)
    held.read(1, 0)
    for number in (1, 2, 3):
        store.shard(number).read(1, 0)
        assert store.holds(0)
        assert len(store.files()) == 2
    held_too = store.shard(3, cache=other)
    held_too.read(1, 0)
    with pytest.raises(MmflowError, match=r"loader.cache.max_bytes: .*6000000 bytes .*4\.tar"):
        store.shard(4).read(1, 0)
    assert held.read(5, 5) == store.bodies[0][5:10]
    waiting = threading.Timer(0.2, lambda: other.release_idle(0))
    waiting.start()
    assert store.shard(4).read(2, 0) == store.bodies[4][:2]  # as soon as the other process releases one
    waiting.join()


def test_concurrent_fetches_stay_within_the_limit(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=4 * SHARD_BYTES)
    shards = [store.shard(number) for number in range(12)]
    peak_bytes, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak_bytes
        wait_until((store.kept / ".lock").exists)
        with open(store.kept / ".lock") as lock:
            while not done.is_set():
                fcntl.flock(lock, fcntl.LOCK_EX)  # nothing is deleted or reserved while counting
                sizes = {}
                for path in store.kept.glob("*.*"):
                    with contextlib.suppress(FileNotFoundError):  # a part has become a shard
                        sizes[path.stat().st_ino] = path.stat().st_size
                peak_bytes = max(peak_bytes, sum(sizes.values()))
                fcntl.flock(lock, fcntl.LOCK_UN)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(6) as threads:
        bodies = list(threads.map(lambda number: shards[number].read(16, number), range(12)))
    done.set()
    watcher.join()
    assert bodies == [store.bodies[number][number : number + 16] for number in range(12)]
    assert SHARD_BYTES <= peak_bytes <= 4 * SHARD_BYTES


def test_processes_that_all_wait_for_space_do_not_deadlock(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=3 * SHARD_BYTES)
    caches = [store.cache, ShardCache(store.kept, store.cache.max_bytes)]  # with the locks of two processes
    shards = [[store.shard(number, cache=cache) for number in range(6)] for cache in caches]

    def read(thread: int) -> bool:
        order = [(5 * thread + 3 * step) % 6 + (step % 2) for step in range(12)]
        return all(
            shards[thread % 2][number % 6].read(9, thread) == store.bodies[number % 6][thread : thread + 9]
            for number in order
        )

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [True] * 4


def test_idle_shards_are_released_in_the_background(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "IDLE_SECONDS", 0.2)
    shard = store.shard(0)
    shard.read(1, 0)
    (path,) = store.kept.glob("*.tar")
    assert is_locked(path)
    wait_until(lambda: not is_locked(path))
    assert store.holds(0)


def test_a_released_shard_is_read_again_without_a_fetch(store: Store, fetched: list[str]) -> None:
    shard = store.shard(0)
    shard.read(1, 0)
    (path,) = store.kept.glob("*.tar")
    store.cache.release_idle(60)
    assert is_locked(path)
    store.cache.release_idle(0)
    assert not is_locked(path)
    assert shard.read(3, 1) == store.bodies[0][1:4]
    assert is_locked(path)
    del shard
    assert not is_locked(path)
    assert len(fetched) == 1


def test_a_shard_larger_than_the_cache_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"loader.cache.max_bytes: 1000, .*0\.tar"):
        Store(tmp_path, max_bytes=1000).shard(0)


def test_a_full_disk_deletes_the_least_recently_read_shard_and_then_fails_clearly(
    tmp_path: Path, small_disk: Callable[[str], Path], fetched: list[str]
) -> None:
    store = Store(tmp_path)
    store.kept = small_disk("7m")
    store.cache = ShardCache(store.kept, 100_000_000)
    for number in range(4):
        store.shard(number).read(1, 0)
        store.cache.release_idle(0)
        time.sleep(0.02)
    assert [store.holds(number) for number in range(4)] == [False, False, True, True]
    (store.kept / "foreign file").write_bytes(bytes(1_300_000))
    with pytest.raises(MmflowError, match=r"loader.cache.directory: .*No space left on device; name a directory"):
        store.shard(4, size=6_100_000).read(1, 0)
    assert not list(store.kept.glob("*.part"))


def test_a_directory_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path)
    store.cache = ShardCache(tmp_path / "file" / "cache", 100_000_000)
    with pytest.raises(MmflowError, match=r"loader.cache.directory: .*file/cache: Not a directory; name a directory"):
        store.shard(0).read(1, 0)


def test_a_directory_emptied_during_reading_is_filled_again(store: Store, fetched: list[str]) -> None:
    shard = store.shard(0)
    shard.read(1, 0)
    shutil.rmtree(store.kept)
    assert shard.read(5, 0) == store.bodies[0][:5]  # the file is still open
    store.cache.release_idle(0)
    assert shard.read(5, 0) == store.bodies[0][:5]
    assert len(fetched) == 2


def test_the_default_directory_is_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert node_cache(ShardCacheConfig()).directory == tmp_path / "mmflow" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert node_cache(ShardCacheConfig()).directory == tmp_path / "home" / ".cache" / "mmflow" / "shards"
    cache = pickle.loads(pickle.dumps(node_cache(ShardCacheConfig(directory="~/here", max_bytes=5))))  # noqa: S301 - our own
    assert (cache.directory, cache.max_bytes) == (tmp_path / "home" / "here", 5)


@pytest.fixture
def remote(small_dataset: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(small_dataset.uri, tmp_path / "bucket")
    return open_dataset(f"fsspec+file://{tmp_path}/bucket")


def test_a_remote_dataset_is_read_through_the_cache(
    remote: Dataset, small_dataset: Dataset, store: Store, fetched: list[str]
) -> None:
    plain = list(Reader(small_dataset, "train"))
    reader = Reader(remote, "train", store.cache)
    assert reader.read(1, 3) == plain[12]
    assert len(fetched) == 1
    assert list(reader) == plain
    again = pickle.loads(pickle.dumps(reader))  # noqa: S301 - our own
    assert [again.read(2, row) for row in range(8)] == plain[23:]
    assert sorted(fetched) == sorted(remote.tar_uri(shard) for shard in reader.shards)


def test_read_ahead_fetches_the_shard_into_the_cache(remote: Dataset, store: Store, fetched: list[str]) -> None:
    reader = Reader(remote, "train", store.cache)
    reader.read_ahead(1, 0, 13)
    wait_until(lambda: store.kept.exists() and store.files() == [".tar"])
    assert fetched == [remote.tar_uri(reader.shards[1])]
    assert reader.read(1, 0).key == "key-9"
    assert len(fetched) == 1


def test_a_shard_with_a_flipped_byte_in_the_cache_is_fetched_again(
    remote: Dataset, small_dataset: Dataset, store: Store, fetched: list[str]
) -> None:
    reader = Reader(remote, "train", store.cache)
    offset = small_dataset.index(reader.shards[0])["image_offset"][4].as_py()
    for read in (lambda: reader.read(0, 4).key, lambda: list(reader.samples(0, 0, 9))[4].key):
        reader.read(0, 0)
        (kept,) = store.kept.glob("*.tar")
        with kept.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x00")
        before = len(fetched)
        assert read() == "key-4"
        assert len(fetched) == before + 1


def test_a_sample_that_does_not_match_its_index_is_fetched_only_once(
    remote: Dataset, store: Store, fetched: list[str]
) -> None:
    edit_index(remote, lambda rows: [row.update(txt_xxh3=row["image_xxh3"]) for row in rows])
    reader = Reader(remote, "train", store.cache)
    for row in range(3):
        with pytest.raises(CorruptArtifactError, match=rf"00000\.tar: txt of row {row} \(key-{row}\)"):
            reader.read(0, row)
    assert len(fetched) == 1
