"""URLs to bytes over HTTP, politely and within limits: every URL ends in one result, whatever its server does.

Pure asyncio, without Ray and without disk; `job` spreads it over a cluster and `store` keeps the results.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yarl import URL

from mmflow.fetch.config import FetchConfig
from mmflow.fetch.guard import NO_URL, Lookup, parse_url
from mmflow.fetch.politeness import Host, Hosts, Robots, backoff, parse_robots
from mmflow.fetch.request import REDIRECTS, Answer, Client, Failure, open_client
from mmflow.sources.reasons import Reason, Rejected

ROBOTS_REDIRECTS = 5  # RFC 9309 2.3.1.2


@dataclass(frozen=True, slots=True)
class Validators:
    """A server's tags of its bytes, for asking later whether they have changed."""

    etag: str | None
    last_modified: str | None

    def headers(self) -> dict[str, str]:
        """The headers of a conditional request."""
        fields = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in fields.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of one URL. `reason` is None on success; then `body` is None for "not modified"."""

    url: str
    reason: Reason | None = None
    detail: str = ""  # never a query string, which may hold tokens
    status: int | None = None
    etag: str | None = None
    last_modified: str | None = None
    body: bytes | None = None

    @property
    def retryable(self) -> bool:
        """Whether the failure may be temporary."""
        return self.reason is Reason.fetch_failed


async def fetch_batch(
    urls: Sequence[str],
    settings: FetchConfig,
    *,
    validators: Mapping[str, Validators] | None = None,
    lookup: Lookup | None = None,
) -> AsyncGenerator[Result, None]:
    """One result for each URL, as they come; close the generator (`aclose`) to stop early.

    URLs with `validators` are fetched only if they changed. `lookup` replaces the system's resolver of names.
    Memory: the bodies in progress, at most request.BODY_BUDGET bytes, and the URLs themselves.
    """
    by_host: dict[str, deque[str]] = {}
    for url in urls:
        try:
            name = parse_url(url, loopback=settings.loopback).raw_host or ""
        except Rejected as rejected:
            yield Result(url=url, reason=rejected.reason, detail=rejected.detail)
        else:
            by_host.setdefault(name, deque()).append(url)
    turns = _turns(by_host, settings.per_host)
    results: asyncio.Queue[tuple[Result, int]] = asyncio.Queue(settings.concurrency)

    async with open_client(settings, lookup) as client:
        fetcher = _Fetcher(client, settings, validators or {})

        async def work() -> None:
            for queue in turns:
                while queue:
                    await results.put(await fetcher.fetch(queue.popleft()))

        workers = [asyncio.create_task(work()) for _ in range(min(settings.concurrency, len(urls)))]
        all_workers = asyncio.gather(*workers)
        try:
            while not (all_workers.done() and results.empty()):
                coming: asyncio.Future[Any] = asyncio.ensure_future(results.get())
                try:
                    await asyncio.wait([coming, all_workers], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    arrived = coming.done()
                    coming.cancel()
                if not arrived:
                    break
                result, held = coming.result()
                yield result
                client.budget.give(held)
            await all_workers  # raises a worker's error
        finally:
            for worker in workers:
                worker.cancel()
            # Waits for them and collects their errors (the first was raised above). Our own cancellation passes.
            await asyncio.gather(all_workers, *workers, return_exceptions=True)


def _turns(by_host: dict[str, deque[str]], per_host: int) -> Iterator[deque[str]]:
    """The hosts' queues, each as often as workers may share it.

    Hosts with most URLs come first, because the longest queue decides when a run ends. Queues are dropped when taken.
    """
    for name in sorted(by_host, key=lambda name: (-len(by_host[name]), name)):
        queue = by_host.pop(name)
        for _ in range(min(per_host, len(queue))):
            yield queue


class _Fetcher:
    """From a URL to its result: robots.txt, redirects and further tries around single requests."""

    def __init__(self, client: Client, settings: FetchConfig, validators: Mapping[str, Validators]) -> None:
        self._client = client
        self._settings = settings
        self._validators = validators
        self._hosts = Hosts(settings.per_host)

    async def fetch(self, url: str) -> tuple[Result, int]:
        """The result, and how many bytes of the budget its body holds."""
        known = self._validators.get(url, Validators(None, None))
        try:
            target = parse_url(url, loopback=self._settings.loopback)
            answer = await self._repeat(lambda: self._follow(target, known.headers(), self._settings.max_redirects))
        except Failure as failure:
            return Result(url=url, reason=failure.reason, detail=failure.detail, status=failure.status), 0
        unchanged = answer.status == 304  # validators that the server does not repeat still hold
        result = Result(
            url=url,
            status=answer.status,
            etag=answer.headers.get("ETag") or (known.etag if unchanged else None),
            last_modified=answer.headers.get("Last-Modified") or (known.last_modified if unchanged else None),
            body=None if unchanged else answer.body,
        )
        return result, answer.held

    async def _repeat(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Ask until there is an answer, a permanent failure, or no try left."""
        tries = 0
        while True:
            tries += 1
            try:
                return await ask()
            except Failure as failure:
                if not failure.again or tries > self._settings.retries:
                    raise
                wait = backoff(tries, failure.wait)
            await asyncio.sleep(wait)

    async def _follow(
        self, url: URL, headers: Mapping[str, str], max_redirects: int, *, is_robots: bool = False
    ) -> Answer:
        """The answer at the end of the redirects; each target is checked like a first address."""
        for hop in range(max_redirects + 1):
            with self._hosts.use(url.raw_host or "") as host:
                if self._settings.robots and not is_robots:
                    await self._check_robots(host, url)
                answer = await self._client.ask(host, url, headers, is_robots=is_robots)
            if answer.status not in REDIRECTS:
                return answer
            if hop < max_redirects:
                url = self._redirected(url, answer.headers["Location"])
        raise Failure(Reason.fetch_refused, f"more than {max_redirects} redirects", status=answer.status)

    def _redirected(self, url: URL, location: str) -> URL:
        try:
            return parse_url(str(url.join(URL(location))), loopback=self._settings.loopback)
        except Rejected as rejected:
            raise Failure(rejected.reason, f"redirected: {rejected.detail}") from rejected
        except NO_URL as error:
            raise Failure(Reason.fetch_refused, "redirected: not a URL") from error

    async def _check_robots(self, host: Host, url: URL) -> None:
        """Raises Failure if robots.txt of the URL's origin forbids it, or is not available for now."""
        origin = str(url.origin())
        async with host.robots_lock:  # one task asks, the others wait for its answer
            if origin not in host.robots:
                host.robots[origin] = await self._fetch_robots(url.origin() / "robots.txt")
        robots = host.robots[origin]
        if not isinstance(robots, Robots):
            reason, detail = robots
            raise Failure(reason, f"robots.txt: {detail}")
        if not robots.allows(url.raw_path_qs):
            raise Failure(Reason.fetch_opted_out, "robots.txt forbids it")

    async def _fetch_robots(self, url: URL) -> Robots | tuple[Reason, str]:
        """The rules, no rules if there is no file (4xx), or why it is not available for now (RFC 9309 2.3.1)."""
        try:
            answer = await self._repeat(lambda: self._follow(url, {}, ROBOTS_REDIRECTS, is_robots=True))
        except Failure as failure:
            no_file = failure.reason is Reason.fetch_gone or failure.status in REDIRECTS
            return Robots() if no_file else (failure.reason, failure.detail)
        self._client.budget.give(answer.held)
        return parse_robots(answer.body, self._client.robot)
