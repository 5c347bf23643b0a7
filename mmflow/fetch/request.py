"""One HTTP request: its limits on time and bytes, and a verdict for every way in which it can end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from mmflow.fetch.config import FetchConfig
from mmflow.fetch.guard import AddressRefusedError, GuardedResolver, Lookup, guarded_socket
from mmflow.fetch.politeness import MAX_ROBOTS_BYTES, Host, opt_out, parse_retry_after, product_token
from mmflow.sources.reasons import Reason

BODY_BUDGET = 256 << 20  # bytes of bodies in progress at once, of all requests of a client
KEEPALIVE = 2.0  # seconds; a host's URLs follow each other at once, and idle sockets of many hosts use up descriptors
REDIRECTS = (301, 302, 303, 307, 308)
WHOLE = (200, 203)
TEMPORARY = (408, 425, 429)  # of the 4xx; all 5xx are temporary
# This machine's own shortages, which say nothing about a host.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Failure(Exception):  # noqa: N818 - a verdict on one URL, not an error of the program
    """How a try ended. `again`: another try in this run may help, after `wait` seconds. No query string in `detail`."""

    def __init__(
        self, reason: Reason, detail: str, *, status: int | None = None, again: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.status, self.again, self.wait = reason, detail, status, again, wait


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole body, or with an empty body a redirect (3xx, Location) or "not modified" (304)."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    held: int  # bytes of the client's budget, to give back once the body is used


class Budget:
    """Bytes that bodies may take in memory, given out in the order of asking so that large ones get their turn."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self, size: int) -> int:
        """Wait for `size` bytes, or for the whole budget if that is less; return the number taken."""
        size = min(size, self._size)
        async with self._turn:
            while self._left < size:
                self._freed.clear()
                await self._freed.wait()
            self._left -= size
        return size

    def give(self, size: int) -> None:
        """Return bytes that were taken."""
        self._left += size
        self._freed.set()


@contextlib.asynccontextmanager
async def open_client(settings: FetchConfig, lookup: Lookup | None = None) -> AsyncIterator[Client]:
    """A client with a guard on every connection. `lookup` replaces the system's resolver of names."""
    connector = aiohttp.TCPConnector(
        resolver=GuardedResolver(loopback=settings.loopback, lookup=lookup),
        socket_factory=guarded_socket(loopback=settings.loopback),
        limit=0,  # `concurrency` and each host's slots limit connections
        ttl_dns_cache=300,
        keepalive_timeout=KEEPALIVE,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        headers={"User-Agent": settings.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # `ask` has its own clock
        auto_decompress=False,  # `_read` decompresses within limits: a small body may unpack to gigabytes
        trust_env=False,  # a proxy would look names up itself, past the guard
    ) as session:
        yield Client(session, settings)


class Client:
    """A session, and the memory that the bodies of all its requests share."""

    def __init__(self, session: aiohttp.ClientSession, settings: FetchConfig) -> None:
        self.budget = Budget(BODY_BUDGET)
        self.robot = product_token(settings.user_agent)
        self._session = session
        self._timeout = settings.timeout
        self._max_bytes = settings.max_bytes

    async def ask(self, host: Host, url: URL, headers: Mapping[str, str], *, is_robots: bool = False) -> Answer:
        """The answer, without following redirects. Raises Failure for everything else, within the timeout.

        For robots.txt, a body that is too long is cut, and an opt-out does not count. If the server closes the
        connection instead of answering, aiohttp itself asks once more at once (RFC 9112 9.3.1: an idle connection may
        close just as it is used again).
        """
        async with host.slots:
            await host.pause()
            if host.closed is not None:
                raise Failure(Reason.fetch_failed, host.closed)
            answered = False
            try:
                async with (
                    asyncio.timeout(self._timeout) as deadline,
                    self._session.get(url, allow_redirects=False, headers=headers) as response,
                ):
                    answered = True
                    _check_status(host, response, conditional=bool(headers))
                    if not is_robots:
                        self._check_opt_out(response)
                    if response.status not in WHOLE:
                        return Answer(response.status, response.headers, b"", 0)
                    return await self._read(response, deadline, is_robots=is_robots)
            except Failure:
                raise
            except Exception as error:  # aiohttp raises more than its documentation says
                failure = _explain(error, answered=answered, timeout=self._timeout)
                if not answered and failure.reason is Reason.fetch_failed and _cause(error).errno not in SHORTAGES:
                    host.missed()
                raise failure from error

    def _check_opt_out(self, response: aiohttp.ClientResponse) -> None:
        tags, reservations = (response.headers.getall(name, []) for name in ("X-Robots-Tag", "TDM-Reservation"))
        if header := opt_out(tags, reservations, self.robot):
            raise Failure(Reason.fetch_opted_out, header, status=response.status)

    async def _read(self, response: aiohttp.ClientResponse, deadline: asyncio.Timeout, *, is_robots: bool) -> Answer:
        """The body, decompressed. Raises Failure past the limit on bytes, whether announced, sent or decompressed."""
        status, announced = response.status, response.content_length
        limit = MAX_ROBOTS_BYTES if is_robots else self._max_bytes

        def too_large(seen: str) -> Failure:
            return Failure(Reason.fetch_too_large, f"{seen}, at most {limit} bytes are kept", status=status)

        if announced is not None and announced > limit and not is_robots:
            raise too_large(f"{announced} bytes announced")
        decoder = _decoder_of(response.headers.get("Content-Encoding", ""), status)
        expected = limit if announced is None or decoder is not None else min(announced, limit)
        clock = asyncio.get_running_loop()
        remaining = (deadline.when() or 0.0) - clock.time()
        deadline.reschedule(None)  # waiting for memory is not the server's fault
        held = await self.budget.take(expected)
        used = 0
        try:
            deadline.reschedule(clock.time() + remaining)
            body, received = bytearray(), 0
            async for chunk in response.content.iter_any():
                received += len(chunk)
                body += chunk if decoder is None else decoder.decompress(chunk, limit + 1 - len(body))
                if max(received, len(body)) > limit:
                    if not is_robots:
                        raise too_large("more was sent")
                    break
            else:
                if decoder is not None and not decoder.eof:
                    raise Failure(Reason.fetch_failed, "compressed body ends early", status=status, again=True)
            used = min(held, len(body))
            return Answer(status, response.headers, bytes(body[:limit]), used)
        finally:
            self.budget.give(held - used)


def _check_status(host: Host, response: aiohttp.ClientResponse, *, conditional: bool) -> None:
    """Raises Failure for a status with neither bytes nor a redirect; updates the host's state."""
    status = response.status
    if status in TEMPORARY or status >= 500:
        wait = parse_retry_after(response.headers.get("Retry-After"))
        if status == 429 or wait is not None:
            host.missed(wait)
        else:
            host.answered()
        raise Failure(Reason.fetch_failed, f"HTTP {status}", status=status, again=host.closed is None, wait=wait)
    host.answered()
    if status in WHOLE or (status == 304 and conditional) or (status in REDIRECTS and "Location" in response.headers):
        return
    raise Failure(Reason.fetch_gone, f"HTTP {status}", status=status)


def _decoder_of(encoding: str, status: int) -> Any:
    """A zlib decompressor for a body that is compressed although we did not ask for it; None for a plain body.

    Raises Failure for an encoding that cannot be decompressed within limits.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=47)  # 32 + 15: detects gzip or zlib
    raise Failure(Reason.fetch_gone, f"Content-Encoding {encoding[:40]!r} was not asked for", status=status)


def _explain(error: Exception, *, answered: bool, timeout: float) -> Failure:
    """What went wrong with a request, without its URL: the client's own message would repeat query strings."""
    cause = _cause(error)
    detail, again = f"malformed answer: {type(error).__name__}", False
    if isinstance(cause, AddressRefusedError):
        return Failure(Reason.fetch_refused, str(cause))
    if isinstance(error, aiohttp.InvalidURL):
        return Failure(Reason.fetch_refused, "not a URL")
    if isinstance(error, TimeoutError):
        detail, again = f"no whole {'body' if answered else 'answer'} within {timeout:g} s", True
    elif isinstance(cause, socket.gaierror):
        detail, again = f"name lookup failed: {cause.strerror}", cause.errno == socket.EAI_AGAIN
    elif isinstance(error, aiohttp.ClientSSLError):
        detail = f"TLS: {type(error).__name__}"
    elif isinstance(error, aiohttp.ClientConnectorError):
        detail, again = f"cannot connect: {cause.strerror or type(cause).__name__}", True
    elif isinstance(error, aiohttp.ClientPayloadError | zlib.error):
        detail, again = "body broken off or damaged", True
    elif isinstance(error, aiohttp.ClientConnectionError | OSError):
        detail, again = "connection dropped", True
    return Failure(Reason.fetch_failed, detail, again=again)


def _cause(error: Exception) -> OSError:
    """The operating system's error behind one of the client, or an empty one."""
    cause = getattr(error, "os_error", error)
    return cause if isinstance(cause, OSError) else OSError()
