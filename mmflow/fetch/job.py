"""Fetching spread over a cluster: each host belongs to one task, and what a task learns is published as it goes."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from mmflow.core.artifacts import exclusive
from mmflow.core.errors import MmflowError
from mmflow.core.progress import Report
from mmflow.core.storage import local_path
from mmflow.fetch.client import Result, fetch_batch
from mmflow.fetch.config import FetchConfig
from mmflow.fetch.fetched import FetchedStore
from mmflow.fetch.guard import parse_url
from mmflow.fetch.known import KnownWriter, next_run, published_by, remove_strays, url_hashes
from mmflow.sources.reasons import Reason, Rejected

TASK_CPUS = 0.25  # a task waits for the network; at 500 images/s it takes about half a core
LOST_TASKS = 3  # times that a task lost with its machine is started again


def fetch_urls(
    urls: Sequence[str], store: str, settings: FetchConfig, *, progress: Report, refresh: bool = False
) -> dict[str, int]:
    """Fetch what is unknown or failed for now into a store; the number of distinct URLs by verdict, `ok` among them.

    `refresh` asks again about every URL, conditionally where its server gave an ETag or a date: unchanged bytes stay,
    and a failure that may pass replaces nothing. Ray must be initialised unless there is nothing to fetch. Safe to kill
    and to run again. Raises BusyArtifactError while another process fetches into the same local store.
    """
    path = local_path(store)
    store = store if path is None else str(path)  # a task's working directory is another
    distinct = list(dict.fromkeys(urls))
    with exclusive(store):
        remove_strays(store)
        wanted = distinct if refresh else FetchedStore(store).pending(distinct, max_bytes=settings.max_bytes)
        if wanted:
            _run(deal_hosts(wanted, settings.num_tasks), store, settings, len(wanted), progress, refresh)
        return FetchedStore(store).counts(distinct)


def _run(
    parts: Sequence[Sequence[str]], store: str, settings: FetchConfig, total: int, progress: Report, refresh: bool
) -> None:
    import ray

    run = next_run(store)
    fetch: Any = ray.remote(fetch_part)  # type: ignore[arg-type]  # its stubs know no keyword arguments
    fetch = fetch.options(num_cpus=TASK_CPUS, max_retries=0, scheduling_strategy="SPREAD")

    def start(task: int) -> Any:
        return fetch.remote(list(parts[task]), store, settings, run=run, task=task, refresh=refresh)

    running: dict[Any, int] = {start(task): task for task in range(len(parts))}
    done, lost = [0] * len(parts), 0
    progress(0, total, "URLs")
    try:
        while running:
            reference: Any = ray.wait(list(running))[0][0]
            task = running[reference]
            try:
                done[task] += ray.get(next(reference))
                progress(sum(done), total, "URLs")
            except StopIteration:
                del running[reference]
            except ray.exceptions.RayTaskError as error:
                raise MmflowError(f"{store}: fetching failed: {error.cause or error}; run it again") from error
            except ray.exceptions.RayError as error:
                lost += 1
                if lost > LOST_TASKS:
                    raise MmflowError(f"{store}: {lost} fetching tasks were lost: {error}") from error
                del running[reference]
                done[task] = 0  # it counts anew, what it has published included
                running[start(task)] = task
    finally:
        for left in running:
            ray.cancel(left, force=True)


def fetch_part(
    urls: Sequence[str], store: str, settings: FetchConfig, *, run: int, task: int, refresh: bool
) -> Iterator[int]:
    """One task: fetches its URLs into the store, and yields how many more are known each time some were published."""
    steps = fetch_into(urls, store, settings, run=run, task=task, refresh=refresh)

    async def step() -> int | None:
        return await anext(steps, None)

    with asyncio.Runner() as runner:
        while (number := runner.run(step())) is not None:
            yield number


async def fetch_into(
    urls: Sequence[str], store: str, settings: FetchConfig, *, run: int, task: int, refresh: bool
) -> AsyncGenerator[int, None]:
    """`fetch_part` without Ray."""
    before = FetchedStore(store, validators=refresh)
    published = published_by(store, run, task)
    if published:  # this task was lost once, with its machine
        new = [url for url in urls if url_hashes([url]).tobytes() not in published]
        yield len(urls) - len(new)
        urls = new
    validators = {url: known for url in urls if (known := before.validators(url))} if refresh else {}
    results = fetch_batch(urls, settings, validators=validators)
    with KnownWriter(store, run, task) as writer:
        try:
            coming = asyncio.ensure_future(anext(results, None))
            while True:
                await asyncio.wait({coming}, timeout=writer.seconds_left())
                if coming.done():
                    result = coming.result()
                    if result is None:
                        break
                    keep(result, before, writer, max_bytes=settings.max_bytes)
                    coming = asyncio.ensure_future(anext(results, None))
                if writer.is_due():
                    yield await asyncio.to_thread(writer.publish)
        finally:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await coming
            await results.aclose()
        if len(writer):
            yield await asyncio.to_thread(writer.publish)


def keep(result: Result, before: FetchedStore, writer: KnownWriter, *, max_bytes: int) -> None:
    """Write a result, unless it is a failure that may pass where something lasting is known."""
    if result.retryable and before.verdict(result.url) not in (Reason.fetch_failed, Reason.fetch_pending):
        return
    if result.reason is None and result.body is None:  # not modified
        entry = before.entry(result.url)
        writer.add_unchanged(result, pack=entry.pack, offset=entry.offset, size=entry.size, body_hash=entry.xxh3)
    else:
        writer.add(result, max_bytes=max_bytes)


def deal_hosts(urls: Sequence[str], num_tasks: int) -> list[list[str]]:
    """The URLs of each task, (tasks,): whole hosts, the largest first and each to the task that has least so far."""
    hosts: dict[str, list[str]] = {}
    for url in urls:
        try:
            name = parse_url(url, loopback=True).raw_host or ""
        except Rejected:
            name = ""  # no request comes of it, only a verdict
        hosts.setdefault(name, []).append(url)
    parts: list[list[str]] = [[] for _ in range(min(num_tasks, len(hosts)))]
    loads = [(0, task) for task in range(len(parts))]
    for _, mine in sorted(hosts.items(), key=lambda each: (-len(each[1]), each[0])):
        load, task = heapq.heappop(loads)
        parts[task] += mine
        heapq.heappush(loads, (load + len(mine), task))
    return parts
