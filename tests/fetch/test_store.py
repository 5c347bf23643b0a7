"""The results of fetched URLs survive kills and reruns, and are never incomplete."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmflow.core.artifacts import exclusive
from mmflow.core.errors import BusyArtifactError, CorruptArtifactError, MmflowError
from mmflow.fetch import store as store_module
from mmflow.fetch.client import Result, Validators
from mmflow.fetch.config import FetchConfig
from mmflow.fetch.job import deal_hosts, fetch_into, fetch_urls
from mmflow.fetch.store import FetchedStore, KnownWriter, next_run, remove_strays, xxh3
from mmflow.sources.reasons import Reason, Rejected
from tests.fetch.webserver import Handler, Server, head, in_turn, no_progress, respond

SETTINGS = FetchConfig(loopback=True, retries=0)


def ok(url: str, body: bytes, **fields: Any) -> Result:
    return Result(url=url, status=200, body=body, **fields)


def write(store: str, results: Sequence[Result], run: int = 1, task: int = 0, max_bytes: int = 1000) -> None:
    with KnownWriter(store, run, task) as writer:
        for result in results:
            writer.add(result, max_bytes=max_bytes)
        writer.publish()


def verdict(store: str, url: str) -> tuple[Reason, str]:
    with pytest.raises(Rejected) as rejected:
        FetchedStore(store).load(url)
    return rejected.value.reason, rejected.value.detail


def fetch(urls: Sequence[str], store: str, settings: FetchConfig = SETTINGS, *, refresh: bool = False) -> int:
    """One run in this process. Returns the number of published results."""

    async def run() -> int:
        steps = fetch_into(urls, store, settings, run=next_run(store), task=0, refresh=refresh)
        return sum([number async for number in steps])

    return asyncio.run(run())


def test_bodies_and_failures_are_read_back(tmp_path: Path) -> None:
    store = str(tmp_path)
    bodies = {f"http://a.example/{n}": bytes([n]) * n for n in range(200)}
    gone = Result(url="http://a.example/gone", reason=Reason.fetch_gone, detail="HTTP 404", status=404)
    write(store, [*(ok(url, body) for url, body in bodies.items()), gone])
    opened = FetchedStore(store)
    assert {url: opened.load(url) for url in bodies} == bodies
    assert verdict(store, gone.url) == (Reason.fetch_gone, "HTTP 404")
    assert verdict(store, "http://a.example/never") == (Reason.fetch_pending, "not fetched yet")
    pickled = pickle.loads(pickle.dumps(opened))  # noqa: S301 - our own, like for a Ray worker
    assert pickled.load("http://a.example/7") == b"\x07" * 7
    urls = [*bodies, *bodies, gone.url, "http://a.example/never"]
    assert opened.counts(urls) == {"ok": 200, "fetch_gone": 1, "fetch_pending": 1}


def test_an_empty_store_has_no_results(tmp_path: Path) -> None:
    store = str(tmp_path / "none")
    opened = FetchedStore(store)
    assert opened.counts(["a", "b"]) == {"fetch_pending": 2}
    assert opened.counts([]) == {}
    assert opened.pending(["a"], max_bytes=1) == ["a"]
    assert verdict(store, "a")[0] is Reason.fetch_pending
    assert opened.fingerprint([]) == FetchedStore(str(tmp_path / "other")).fingerprint([])


def test_urls_with_a_half_equal_hash_stay_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(data: bytes) -> bytes:
        return bytes(8) + xxh3(data)[8:]

    monkeypatch.setattr(store_module, "xxh3", half)
    urls = [f"u{n}" for n in range(50)]
    write(str(tmp_path), [ok(url, url.encode()) for url in urls])
    opened = FetchedStore(str(tmp_path))
    assert [opened.load(url) for url in urls] == [url.encode() for url in urls]
    assert opened.counts([*urls, "other"]) == {"fetch_pending": 1, "ok": 50}


def test_unusual_urls_and_details_are_kept(tmp_path: Path) -> None:
    store, urls = str(tmp_path), ["", "\x00", "http://\ud800.example", "ü" * 9_000]
    write(store, [Result(url=url, reason=Reason.fetch_refused, detail=f"bad \udcff {n}") for n, url in enumerate(urls)])
    assert [verdict(store, url)[1] for url in urls] == [f"bad ? {n}" for n in range(4)]


def test_the_newest_row_counts(tmp_path: Path) -> None:
    store, url = str(tmp_path), "http://a.example/1"
    write(store, [Result(url=url, reason=Reason.fetch_failed, detail="HTTP 500")], run=2)
    write(store, [ok(url, b"newest")], run=10)
    write(store, [ok(url, b"older")], run=9)
    assert FetchedStore(store).load(url) == b"newest"
    write(store, [Result(url=url, reason=Reason.fetch_opted_out, detail="X-Robots-Tag: noai")], run=11)
    assert verdict(store, url) == (Reason.fetch_opted_out, "X-Robots-Tag: noai")


def test_the_fingerprint_changes_only_with_results_and_bytes(tmp_path: Path) -> None:
    store, urls = str(tmp_path), ["a", "b", "c"]

    def now(of: Sequence[str] = urls) -> str:
        return FetchedStore(store).fingerprint(of)

    prints = [now()]
    changes = [
        ok("a", b"1"),
        Result(url="b", reason=Reason.fetch_failed, detail="HTTP 500"),
        Result(url="b", reason=Reason.fetch_gone, detail="HTTP 404"),
        ok("a", b"2"),
    ]
    for run, result in enumerate(changes, 1):
        write(store, [result], run=run)
        prints.append(now())
    assert len(set(prints)) == len(prints)
    assert len({now(["a"]), now(["b"]), now(["c"]), now(["a", "b"])}) == 4

    write(store, [ok("a", b"2", etag="new"), ok("other", b"3")], run=5)  # the same bytes at another offset
    write(store, [Result(url="b", reason=Reason.fetch_gone, detail="HTTP 410")], run=6)  # the same verdict
    assert now() == prints[-1]
    assert now(["c", "a", "b", "a"]) == prints[-1]  # neither order nor repeats matter
    moved = tmp_path.rename(tmp_path.parent / "moved")
    assert FetchedStore(str(moved)).fingerprint(urls) == prints[-1]


def test_only_temporary_failures_and_new_urls_are_pending(tmp_path: Path) -> None:
    store = str(tmp_path)
    permanent = [Reason.fetch_refused, Reason.fetch_opted_out, Reason.fetch_gone, Reason.fetch_too_large]
    write(store, [Result(url=str(reason), reason=reason) for reason in [*permanent, Reason.fetch_failed]])
    write(store, [ok("ok", b"x")], run=2)
    urls = ["new", "ok", *map(str, permanent), "fetch_failed"]
    assert FetchedStore(store).pending(urls, max_bytes=1000) == ["new", "fetch_failed"]
    assert FetchedStore(store).pending(urls, max_bytes=1001) == ["new", "fetch_too_large", "fetch_failed"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_bytes_are_an_error(tmp_path: Path, damage: str) -> None:
    write(str(tmp_path), [ok("a", b"first"), ok("b", b"second")])
    (pack,) = (tmp_path / "packs").iterdir()
    data = pack.read_bytes()
    if damage == "missing":
        pack.unlink()
    else:
        pack.write_bytes(data[:-1] if damage == "cut" else data[:-1] + b"X")
    opened = FetchedStore(str(tmp_path))
    with pytest.raises(CorruptArtifactError, match=f"{pack.name}.*delete it and .*{pack.stem}.parquet"):
        opened.load("b")
    if damage != "missing":
        assert opened.load("a") == b"first"


def test_unpublished_results_leave_no_files(tmp_path: Path) -> None:
    with KnownWriter(str(tmp_path), 1, 0) as writer:
        writer.add(ok("a", b"x"), max_bytes=1)
        assert len(list((tmp_path / "packs").iterdir())) == 1
    assert list((tmp_path / "packs").iterdir()) == []
    assert FetchedStore(str(tmp_path)).counts(["a"]) == {"fetch_pending": 1}


def test_an_old_pack_without_its_table_is_removed(tmp_path: Path) -> None:
    write(str(tmp_path), [ok("a", b"x")], run=1)
    write(str(tmp_path), [ok("b", b"y")], run=2)
    (stray,) = (tmp_path / "packs").glob("000002-*")
    (table,) = (tmp_path / "known").glob("000002-*")
    table.unlink()
    half = tmp_path / "known" / ".staging-killed"
    half.write_bytes(b"half")
    remove_strays(str(tmp_path))
    assert stray.exists()  # it may belong to a live task that has not written its table yet
    for path in (tmp_path / "packs").iterdir():
        os.utime(path, (0, 0))
    os.utime(half, (0, 0))
    remove_strays(str(tmp_path))
    assert not stray.exists()
    assert not half.exists()
    assert FetchedStore(str(tmp_path)).load("a") == b"x"


def test_a_refresh_keeps_unchanged_bodies_and_survives_temporary_failures(server: Server, tmp_path: Path) -> None:
    async def dated(request: Any, writer: asyncio.StreamWriter) -> bool | None:
        assert request.number == 1 or request.headers["if-none-match"] == '"v1"'
        answer = respond(200, b"same", ETag='"v1"') if request.number == 1 else respond(304)
        return await answer(request, writer)

    routes: dict[str, Handler] = {
        "/same": dated,
        "/other": in_turn(respond(200, b"old", ETag='"a"'), respond(200, b"new", ETag='"b"')),
        "/down": in_turn(respond(200, b"kept"), respond(500)),
        "/gone": in_turn(respond(200, b"was here"), respond(404)),
        "/opted": in_turn(respond(200, b"was here"), respond(200, b"x", TDM_Reservation="1")),
    }
    server.routes |= routes
    store, urls = str(tmp_path), [server.url(path) for path in routes]
    fetch(urls, store)
    assert FetchedStore(store).counts(urls) == {"ok": 5}
    same = FetchedStore(store).fingerprint(urls[:1])
    for _ in range(2):
        fetch(urls, store, refresh=True)
        opened = FetchedStore(store, validators=True)
        assert [opened.load(url) for url in urls[:3]] == [b"same", b"new", b"kept"]
        assert [verdict(store, url)[0] for url in urls[3:]] == [Reason.fetch_gone, Reason.fetch_opted_out]
        assert opened.validators(urls[0]) == Validators('"v1"', None)
        assert opened.validators(urls[3]) is None
        assert opened.fingerprint(urls[:1]) == same
    assert server.counts["/same"] == 3


def test_results_are_published_periodically(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SECONDS_PER_TABLE", 0.2)

    async def late(request: Any, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)

    server.routes["/a"], server.routes["/late"] = respond(200, b"a"), late
    urls = [server.url("/a"), server.url("/late", "localhost")]

    async def first() -> tuple[int, dict[str, int]]:
        steps = fetch_into(urls, str(tmp_path), SETTINGS, run=1, task=0, refresh=False)
        number = await anext(steps)
        counts = FetchedStore(str(tmp_path)).counts(urls)
        await steps.aclose()
        return number, counts

    assert asyncio.run(first()) == (1, {"fetch_pending": 1, "ok": 1})
    assert [path.name for path in (tmp_path / "packs").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("bound", [("RESULTS_PER_TABLE", 4), ("BYTES_PER_PACK", 4_000)])
def test_tables_and_packs_are_bounded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: tuple[str, int]
) -> None:
    monkeypatch.setattr(store_module, *bound)
    server.routes["/a"] = respond(200, bytes(1000))
    urls = [server.url(f"/a?{n}") for n in range(10)]
    assert fetch(urls, str(tmp_path)) == 10
    assert [len(list((tmp_path / folder).iterdir())) for folder in ("packs", "known")] == [3, 3]
    assert FetchedStore(str(tmp_path)).counts(urls) == {"ok": 10}


def test_a_restarted_task_skips_what_it_published(server: Server, tmp_path: Path) -> None:
    server.routes["/a"] = respond(200, b"a")
    urls = [server.url(f"/a?{n}") for n in range(6)]
    write(str(tmp_path), [ok(url, b"before") for url in urls[:4]], run=3, task=1)
    write(str(tmp_path), [ok(urls[5], b"another task's")], run=3, task=0)

    async def run() -> list[int]:
        steps = fetch_into(urls, str(tmp_path), SETTINGS, run=3, task=1, refresh=False)
        return [number async for number in steps]

    assert asyncio.run(run()) == [4, 2]
    assert server.counts["/a"] == 2
    assert FetchedStore(str(tmp_path)).load(urls[0]) == b"before"


KILLED = """
import asyncio, sys
from mmflow.fetch import store as store_module
from mmflow.fetch.config import FetchConfig
from mmflow.fetch.job import fetch_into
from mmflow.fetch.store import FetchedStore
store_module.RESULTS_PER_TABLE = 10

async def main(store, urls):
    settings = FetchConfig(loopback=True, per_host=8, concurrency=8)
    pending = FetchedStore(store).pending(urls, max_bytes=settings.max_bytes)
    async for _ in fetch_into(pending, store, settings, run=store_module.next_run(store), task=0, refresh=False):
        print("published", flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


def test_kill_9_loses_no_published_result_and_leaves_no_partial_one(server: Server, tmp_path: Path) -> None:
    async def picture(request: Any, writer: asyncio.StreamWriter) -> bool:
        body = request.path.encode() * 2_000
        writer.write(head(200, Content_Length=str(len(body))) + body[:7_000])
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(body[7_000:])
        return True

    server.routes["/a"] = picture
    store, urls = str(tmp_path / "store"), [server.url(f"/a?{n}") for n in range(120)]
    command = [sys.executable, "-c", KILLED, store, *urls]
    known_before = 0
    for published in (1, 3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(published):
                assert process.stdout.readline() == "published\n"
            time.sleep(0.004 * published)
            process.send_signal(signal.SIGKILL)
        opened = FetchedStore(store)
        counts = opened.counts(urls)
        assert set(counts) <= {"ok", "fetch_pending"}
        assert counts["ok"] >= known_before + 10 * published  # what was published stays known
        known_before = counts["ok"]
        for url in urls:
            if opened.verdict(url) == "ok":
                assert opened.load(url) == url.removeprefix(server.url("")).encode() * 2_000
    assert known_before < len(urls)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    opened = FetchedStore(store)
    assert [opened.load(url) for url in urls] == [f"/a?{n}".encode() * 2_000 for n in range(120)]
    # Only URLs that were in progress or not yet in a table at the two kills were requested again.
    assert server.counts["/a"] <= len(urls) + 2 * 60


def test_each_host_belongs_to_one_task() -> None:
    urls = [f"http://host{host}.example:{8000 + n % 2}/{n}" for host in range(20) for n in range(1 + host % 5)]
    strange = ["ftp://x", "no url"]
    parts = deal_hosts([*urls, *strange], 4)
    assert sorted(url for part in parts for url in part) == sorted([*urls, *strange])
    hosts = [{url.split("/")[2].split(":")[0] for url in part if url in urls} for part in parts]
    assert sum(map(len, hosts)) == len(set.union(*hosts)) == 20
    assert max(map(len, parts)) - min(map(len, parts)) <= 2
    assert deal_hosts([*urls, *strange], 4) == parts
    assert deal_hosts(urls[:1], 4) == [urls[:1]]


def test_a_store_in_use_is_refused(tmp_path: Path) -> None:
    with exclusive(str(tmp_path)), pytest.raises(BusyArtifactError):
        fetch_urls(["http://a.example/"], str(tmp_path), SETTINGS, progress=no_progress)


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_fetch_their_hosts_and_a_second_run_sends_no_request(server: Server, tmp_path: Path) -> None:
    async def echo(request: Any, writer: asyncio.StreamWriter) -> bool | None:
        return await respond(200, request.path.encode())(request, writer)

    server.routes["/a"] = echo
    hosts = ["127.0.0.1", "localhost"]
    urls = [server.url(f"/a?{n}", host) for n in range(30) for host in hosts]
    unavailable = [server.url("/gone"), "http://10.0.0.1/", urls[0]]
    settings = FetchConfig(loopback=True, num_tasks=2)
    steps: list[tuple[int, int]] = []
    counts = fetch_urls(
        [*urls, *unavailable], str(tmp_path), settings, progress=lambda done, total, note: steps.append((done, total))
    )
    assert counts == {"fetch_gone": 1, "fetch_refused": 1, "ok": 60}
    assert (steps[0], steps[-1]) == ((0, 62), (62, 62))
    opened = FetchedStore(str(tmp_path))
    assert all(opened.load(url) == f"/a?{n // 2}".encode() for n, url in enumerate(urls))
    num_hits = len(server.hits)
    assert fetch_urls([*urls, *unavailable], str(tmp_path), settings, progress=no_progress) == counts
    assert len(server.hits) == num_hits
    assert {path.name.split("-")[1] for path in (tmp_path / "known").iterdir()} == {"0000", "0001"}


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_that_cannot_write_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "packs").symlink_to(tmp_path / "nowhere")
    server.routes["/a"] = respond(200, b"a")
    with pytest.raises(MmflowError, match=r"packs.*run it again"):
        fetch_urls([server.url("/a")], str(tmp_path), SETTINGS, progress=no_progress)


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_task_is_restarted(server: Server, tmp_path: Path) -> None:
    async def deadly(request: Any, writer: asyncio.StreamWriter) -> bool | None:
        if request.number == 2:
            for process in psutil.Process().children(recursive=True):  # only this test's own Ray
                with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                    if "ray::fetch_part" in " ".join(process.cmdline()):
                        process.kill()
        return await respond(200, request.path.encode())(request, writer)

    server.routes["/a"] = deadly
    urls = [server.url(f"/a?{n}") for n in range(20)]
    settings = FetchConfig(loopback=True, num_tasks=1, per_host=1)
    steps: list[int] = []
    counts = fetch_urls(urls, str(tmp_path), settings, progress=lambda done, total, note: steps.append(done))
    assert counts == {"ok": 20}
    assert steps[-1] == 20
    assert server.counts["/robots.txt"] == 2
