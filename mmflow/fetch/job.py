"""Fetching on Ray: the images of a recipe's sources that are URLs, dealt to tasks by host, published as they arrive.

Fetching is separate from building and comes first, because it may go on for days and learn more each night. The fetched
state of a recipe's URLs is an input of its dataset, as the files of its sources are: the dataset is built anew when it
changes.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmflow.core.artifacts import content_hash, exclusive
from mmflow.core.errors import MmflowError
from mmflow.core.progress import Report
from mmflow.core.storage import exists, join, local_path, read_json, write_json
from mmflow.fetch.client import fetch_batch
from mmflow.fetch.config import FetchConfig
from mmflow.fetch.guard import parse_url
from mmflow.fetch.store import FetchedStore, KnownWriter, next_run, published_by, remove_strays, url_hashes
from mmflow.sources.config import SourceConfig
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import Unit, rows_of_chunks
from mmflow.sources.sources import KINDS, PREPARE_CPUS, read_chunks, read_unit

SCHEMES = "^https?://"
UNSETTLED = (Reason.fetch_pending, Reason.fetch_failed)
RECORDS_AT_ONCE = 2_000_000  # URLs in this process's memory: 200 MB
RECORDS_READ_HERE = 20_000  # read in 3 s, which is what a Ray Data job costs before it has read one
TASK_CPUS = 0.25  # a task waits for the network; at 500 images/s it takes about half a core
LOST_TASKS = 3  # times that a task lost with its machine is started again


def fetch_images(
    store: str,
    sources: Sequence[SourceConfig],
    units: Sequence[Unit],
    identity: str,
    settings: FetchConfig,
    report: Report,
) -> None:
    """Fetch the units' URLs that are missing into the store, and note their state under `identity`, the sources'.

    Ray must be initialised.
    """
    fingerprints: list[str] = []
    num_urls = unsettled = too_large = 0
    kinds = [(unit, KINDS[unit.kind], sources[unit.source].fields) for unit in units]
    units = [unit for unit, kind, fields in kinds if kind.may_name_urls and not kind.holds_bodies(unit, fields)]
    totals = itertools.accumulate(unit.records or RECORDS_AT_ONCE // 10 for unit in units)
    for _, group in itertools.groupby(zip(totals, units, strict=True), lambda pair: pair[0] // RECORDS_AT_ONCE):
        if urls := urls_of([unit for _, unit in group], sources):
            counts = fetch_urls(urls, store, settings, progress=report, refresh=settings.refresh)
            num_urls += sum(counts.values())
            unsettled += sum(counts.get(str(reason), 0) for reason in UNSETTLED)
            too_large += counts.get(str(Reason.fetch_too_large), 0)
            fingerprints.append(FetchedStore(store).fingerprint(urls))
    note = {"urls": num_urls, "unsettled": unsettled, "too_large": too_large, "max_bytes": settings.max_bytes}
    write_json(_note(store, identity), note | {"fingerprint": content_hash(fingerprints) if num_urls else None})


def is_settled(store: str, identity: str, settings: FetchConfig) -> bool:
    """Whether fetching would learn nothing: all URLs have a permanent result, and no `refresh` asks them again.

    A body that was too large is settled as long as the limit is not raised.
    """
    if settings.refresh or not exists(_note(store, identity)):
        return False
    note = read_json(_note(store, identity))
    return not note["unsettled"] and not (note["too_large"] and settings.max_bytes > note["max_bytes"])


def known_images(store: str, identity: str) -> str | None:
    """The fingerprint of the state of the sources' URLs; None if there are no URLs, or nothing was fetched yet."""
    return read_json(_note(store, identity))["fingerprint"] if exists(_note(store, identity)) else None


def _note(store: str, identity: str) -> str:
    return join(store, "sources", f"{identity[:32]}.json")


def may_have_urls(units: Sequence[Unit]) -> bool:
    """Whether the images of any unit may be URLs, by its kind."""
    return any(KINDS[unit.kind].may_name_urls for unit in units)


def urls_of(units: Sequence[Unit], sources: Sequence[SourceConfig]) -> list[str]:
    """The distinct URLs that the units' records name as images, sorted."""
    urls: set[str] = set()
    if sum(RECORDS_AT_ONCE if unit.records is None else unit.records for unit in units) <= RECORDS_READ_HERE:
        for unit in units:
            for records in read_unit(unit, sources[unit.source]):
                urls.update(_urls(records).to_pylist())
        return sorted(urls)
    tables = read_chunks(units, sources).map_batches(
        _urls_of_chunks, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=PREPARE_CPUS
    )
    batch: Any
    for batch in tables.iter_batches(batch_size=None, batch_format="pyarrow"):
        urls.update(*batch["urls"].to_pylist())
    return sorted(urls)


def _urls(records: pa.Table) -> pa.Array:
    images = records["images"].combine_chunks().flatten()
    return pc.unique(images.filter(pc.match_substring_regex(images, SCHEMES)))


def _urls_of_chunks(chunks: pa.Table) -> pa.Table:
    urls = _urls(rows_of_chunks(chunks))
    return pa.table({"urls": pa.LargeListArray.from_arrays([0, len(urls)], urls)})


# --- tasks ------------------------------------------------------------------------------------------------------------


def fetch_urls(
    urls: Sequence[str], store: str, settings: FetchConfig, *, progress: Report, refresh: bool = False
) -> dict[str, int]:
    """Fetch unknown URLs, and those that failed for now, into a store; count the distinct URLs by verdict or `ok`.

    `refresh` asks again about every URL, conditionally where its server gave an ETag or a date: unchanged bytes stay,
    and a temporary failure replaces nothing. Ray must be initialised if there is anything to fetch. Safe to kill and to
    run again. Raises BusyArtifactError while another process fetches into the same local store.
    """
    path = local_path(store)
    store = store if path is None else str(path)  # a task has another working directory
    distinct = list(dict.fromkeys(urls))
    with exclusive(store):
        remove_strays(store)
        wanted = distinct if refresh else FetchedStore(store).pending(distinct, max_bytes=settings.max_bytes)
        if wanted:
            _run(deal_hosts(wanted, settings.num_tasks), store, settings, len(wanted), progress, refresh)
        return FetchedStore(store).counts(distinct)


def deal_hosts(urls: Sequence[str], num_tasks: int) -> list[list[str]]:
    """The URLs of each task, (tasks,): whole hosts, largest first, each to the task with fewest URLs so far."""
    hosts: dict[str, list[str]] = {}
    for url in urls:
        try:
            name = parse_url(url, loopback=True).raw_host or ""
        except Rejected:
            name = ""  # never requested
        hosts.setdefault(name, []).append(url)
    parts: list[list[str]] = [[] for _ in range(min(num_tasks, len(hosts)))]
    loads = [(0, task) for task in range(len(parts))]
    for _, urls_of_host in sorted(hosts.items(), key=lambda item: (-len(item[1]), item[0])):
        load, task = heapq.heappop(loads)
        parts[task] += urls_of_host
        heapq.heappush(loads, (load + len(urls_of_host), task))
    return parts


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
    done, num_lost = [0] * len(parts), 0
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
                num_lost += 1
                if num_lost > LOST_TASKS:
                    raise MmflowError(f"{store}: {num_lost} fetching tasks were lost: {error}") from error
                del running[reference]
                done[task] = 0  # the new task counts what the lost one published
                running[start(task)] = task
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def fetch_part(
    urls: Sequence[str], store: str, settings: FetchConfig, *, run: int, task: int, refresh: bool
) -> Iterator[int]:
    """One task: fetches its URLs into the store, and yields the number of results each time it publishes some."""
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
        coming = asyncio.ensure_future(anext(results, None))
        try:
            while True:
                await asyncio.wait({coming}, timeout=writer.seconds_left())
                if coming.done():
                    result = coming.result()
                    if result is None:
                        break
                    if result.reason is None and result.body is None:  # not modified
                        writer.add_unchanged(result, before.entry(result.url))
                    elif not result.retryable or before.verdict(result.url) in UNSETTLED:  # else it replaces nothing
                        writer.add(result, max_bytes=settings.max_bytes)
                    coming = asyncio.ensure_future(anext(results, None))
                if writer.is_due():
                    yield await asyncio.to_thread(writer.publish)
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await results.aclose()
        if len(writer):
            yield await asyncio.to_thread(writer.publish)
