"""A web server on 127.0.0.1 that can misbehave: handlers write any raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class Request:
    path: str  # with its query
    headers: dict[str, str]  # names in lower case
    number: int  # how often the path was requested, including this request


Handler = Callable[[Request, asyncio.StreamWriter], Awaitable[bool | None]]
"""Writes a response; the connection stays open if it returns True."""


@dataclass
class Server:
    """Answers 404 for paths without a handler, so robots.txt forbids nothing by default."""

    port: int = 0
    routes: dict[str, Handler] = field(default_factory=dict)
    hits: list[Request] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    under_way: int = 0
    max_under_way: int = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._serve_one(reader, writer):
                pass
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split(" ")[1]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        bare = path.partition("?")[0]
        self.counts[bare] += 1
        request = Request(path, headers, self.counts[bare])
        self.hits.append(request)
        self.under_way += 1
        self.max_under_way = max(self.max_under_way, self.under_way)
        try:
            keep = await self.routes.get(bare, respond(404, b"no"))(request, writer)
            await writer.drain()
        finally:
            self.under_way -= 1
        return bool(keep)


def respond(status: int = 200, body: bytes = b"", **headers: str) -> Handler:
    """A correct response; `_` in header names stands for `-`."""

    async def handler(request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(head(status, Content_Length=str(len(body)), **headers) + body)
        return True

    return handler


def head(status: int, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode()


def raw(data: bytes) -> Handler:
    """Writes these bytes and closes the connection."""

    async def handler(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return handler


def in_turn(*handlers: Handler) -> Handler:
    """The first handler answers the first request, and so on; the last answers all later requests."""

    async def handler(request: Request, writer: asyncio.StreamWriter) -> bool | None:
        return await handlers[min(request.number, len(handlers)) - 1](request, writer)

    return handler


def endless(server: Server, first: bytes, block: bytes, seconds: float = 0.0) -> Handler:
    """Writes `first`, then `block` again and again while the client listens (at most 64 MB)."""

    async def handler(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        for _ in range(64_000_000 // len(block)):
            writer.write(block)
            server.sent += len(block)
            await writer.drain()
            await asyncio.sleep(seconds)

    return handler


async def silence(request: Request, writer: asyncio.StreamWriter) -> None:
    """No response for longer than any test waits."""
    await asyncio.sleep(30)


@pytest.fixture
def server() -> Iterator[Server]:
    """The server in its own thread, so that other processes can be its clients too."""
    server = Server()
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.serve, "127.0.0.1", 0))
    server.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def stop() -> None:
        listening.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def no_progress(done: int, total: int, note: str) -> None:
    """Ignores the progress."""
