"""Whatever a server does, each URL gets one result within limits of time, bytes and politeness."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest

from mmflow.fetch import politeness
from mmflow.fetch.client import Result, Validators, fetch_batch
from mmflow.fetch.config import FetchConfig
from mmflow.fetch.guard import Address
from mmflow.fetch.politeness import backoff, parse_retry_after
from mmflow.fetch.request import Budget
from mmflow.sources.reasons import Reason
from tests.fetch.test_guard import answers
from tests.fetch.webserver import Handler, Server, endless, head, in_turn, raw, respond, silence

IMAGE = bytes(range(256)) * 40
CUT = raw(head(200, Content_Length="9") + b"x")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(politeness, "FIRST_PAUSE", 0.01)


def fetch_all(urls: Sequence[str], **settings: Any) -> list[Result]:
    return asyncio.run(collect(urls, **settings))


async def collect(
    urls: Sequence[str], validators: dict[str, Validators] | None = None, lookup: Any = None, **settings: Any
) -> list[Result]:
    config = FetchConfig(**{"loopback": True, "timeout": 5.0, **settings})
    return [result async for result in fetch_batch(urls, config, validators=validators, lookup=lookup)]


def fetch_one(url: str, **settings: Any) -> Result:
    (result,) = fetch_all([url], **settings)
    assert result.url == url
    assert "secret" not in result.detail
    assert (result.body is None) == (result.reason is not None)
    return result


def test_bodies_are_complete_whatever_their_content_type(server: Server) -> None:
    server.routes["/a.jpg"] = respond(200, IMAGE, Content_Type="text/html", ETag='"v1"', Last_Modified="yesterday")
    server.routes["/b.jpg"] = raw(head(200, Transfer_Encoding="chunked") + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    server.routes["/empty.jpg"] = respond(200, b"")
    a = fetch_one(server.url("/a.jpg?token=secret"))
    assert (a.reason, a.body, a.status, a.etag, a.last_modified) == (None, IMAGE, 200, '"v1"', "yesterday")
    assert fetch_one(server.url("/b.jpg")).body == b"abcde"
    assert fetch_one(server.url("/empty.jpg")).body == b""


def test_requests_send_the_user_agent_and_no_cookies(server: Server) -> None:
    server.routes["/a"] = respond(200, IMAGE, Set_Cookie="id=1; Path=/")
    fetch_all([server.url("/a?1"), server.url("/a?2")], per_host=1, user_agent="our-bot/2 (+https://a.example)")
    for hit in server.hits:
        assert hit.headers["user-agent"] == "our-bot/2 (+https://a.example)"
        assert hit.headers["accept-encoding"] == "identity"
        assert "cookie" not in hit.headers


def test_proxies_of_the_environment_are_ignored(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    server.routes["/a"] = respond(200, IMAGE)
    assert fetch_one(server.url("/a")).body == IMAGE


def test_an_announced_huge_body_is_not_read(server: Server) -> None:
    server.routes["/huge"] = endless(server, head(200, Content_Length="900000000000"), bytes(10_000), seconds=0.01)
    result = fetch_one(server.url("/huge"), max_bytes=100_000)
    assert (result.reason, result.status) == (Reason.fetch_too_large, 200)
    assert "900000000000 bytes" in result.detail
    assert server.sent < 1_000_000
    assert server.counts["/huge"] == 1


@pytest.mark.parametrize(
    "first", [head(200, Connection="close"), head(200, Transfer_Encoding="chunked")], ids=["close", "chunked"]
)
def test_an_endless_body_is_stopped_at_the_limit(server: Server, first: bytes) -> None:
    block = bytes(9_984)
    chunk = b"2700\r\n" + block + b"\r\n" if b"chunked" in first else block
    server.routes["/endless"] = endless(server, first, chunk, seconds=0.002)
    result = fetch_one(server.url("/endless"), max_bytes=100_000)
    assert result.reason is Reason.fetch_too_large
    assert server.sent < 10_000_000  # what the socket buffers hold


def test_a_body_of_exactly_the_limit_is_kept(server: Server) -> None:
    server.routes["/a"] = respond(200, bytes(1000))
    server.routes["/b"] = raw(head(200, Connection="close") + bytes(1000))
    for path in ("/a", "/b"):
        assert fetch_one(server.url(path), max_bytes=1000).body == bytes(1000)
        assert fetch_one(server.url(path), max_bytes=999).reason is Reason.fetch_too_large


def test_a_compressed_body_is_decompressed_within_the_limit(server: Server) -> None:
    small, bomb = gzip.compress(IMAGE), gzip.compress(bytes(50_000_000))
    server.routes["/small"] = respond(200, small, Content_Encoding="gzip")
    server.routes["/bomb"] = respond(200, bomb, Content_Encoding="gzip")
    server.routes["/cut"] = respond(200, small[:-9], Content_Encoding="gzip")
    server.routes["/junk"] = respond(200, b"no gzip", Content_Encoding="gzip")
    server.routes["/br"] = respond(200, b"brotli", Content_Encoding="br")
    assert fetch_one(server.url("/small")).body == IMAGE
    assert fetch_one(server.url("/bomb"), max_bytes=1_000_000).reason is Reason.fetch_too_large
    assert fetch_one(server.url("/cut"), retries=0).reason is Reason.fetch_failed
    assert fetch_one(server.url("/junk"), retries=0).reason is Reason.fetch_failed
    assert fetch_one(server.url("/br")).reason is Reason.fetch_gone


def test_a_body_shorter_than_announced_is_retried_and_never_kept(server: Server) -> None:
    half = raw(head(200, Content_Length=str(len(IMAGE))) + IMAGE[:5000])
    server.routes["/half"] = half
    server.routes["/once"] = in_turn(half, respond(200, IMAGE))
    server.routes["/chunk"] = raw(head(200, Transfer_Encoding="chunked") + b"400\r\nabc")
    result = fetch_one(server.url("/half?secret"), retries=1)
    assert (result.reason, server.counts["/half"]) == (Reason.fetch_failed, 2)
    assert fetch_one(server.url("/once")).body == IMAGE
    assert fetch_one(server.url("/chunk"), retries=0).reason is Reason.fetch_failed


def test_bytes_after_the_announced_length_do_not_reach_later_responses(server: Server) -> None:
    async def liar(request: Any, writer: asyncio.StreamWriter) -> bool:
        writer.write(head(200, Content_Length="10") + b"0123456789" + head(200, Content_Length="4") + b"evil")
        return True

    server.routes["/liar"] = liar
    server.routes["/good"] = respond(200, IMAGE)
    urls = [server.url("/liar"), *(server.url(f"/good?{n}") for n in range(4))]
    results = {result.url: result for result in fetch_all(urls, per_host=1)}
    assert results[urls[0]].body in (b"0123456789", None)
    assert [results[url].body for url in urls[1:]] == [IMAGE] * 4


def test_silent_and_slow_servers_cost_at_most_the_timeout(server: Server) -> None:
    server.routes["/silent"] = silence
    server.routes["/body"] = endless(server, head(200, Content_Length="5000"), b"x", seconds=0.02)
    server.routes["/head"] = endless(server, b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", seconds=0.02)
    urls = [server.url(path) for path in ("/silent", "/body", "/head")]
    began = time.monotonic()
    results = {result.url: result for result in fetch_all(urls, timeout=0.4, retries=1, robots=False, per_host=3)}
    assert time.monotonic() - began < 3
    assert [results[url].reason for url in urls] == [Reason.fetch_failed] * 3
    assert all("0.4 s" in results[url].detail for url in urls)
    assert [server.counts[path] for path in ("/silent", "/body", "/head")] == [2, 2, 2]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"SSH-2.0-OpenSSH_9.0\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: minus\r\n\r\n",
        b"HTTP/1.1 999999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        bytes(1000),
    ],
)
def test_a_response_that_is_not_http_fails_only_its_url(server: Server, answer: bytes) -> None:
    server.routes["/odd"] = raw(answer)
    server.routes["/good"] = respond(200, IMAGE)
    urls = [server.url("/odd?secret"), server.url("/good")]
    odd, good = sorted(fetch_all(urls, retries=0), key=lambda result: urls.index(result.url))
    assert odd.reason is Reason.fetch_failed
    assert "secret" not in odd.detail
    assert good.body == IMAGE


def test_redirects_are_followed_up_to_their_limit(server: Server) -> None:
    server.routes["/1"] = respond(302, b"moved", Location="/2?x=1")
    server.routes["/2"] = respond(308, b"moved", Location=server.url("/3", "localhost"))
    server.routes["/3"] = respond(200, IMAGE)
    assert fetch_one(server.url("/1")).body == IMAGE
    assert fetch_one(server.url("/1"), max_redirects=2).body == IMAGE
    assert fetch_one(server.url("/1"), max_redirects=1).reason is Reason.fetch_refused
    server.routes["/loop"] = respond(302, b"", Location="/loop?secret")
    assert fetch_one(server.url("/loop"), max_redirects=3).reason is Reason.fetch_refused
    assert server.counts["/loop"] == 4


@pytest.mark.parametrize(
    "target",
    [
        *("http://10.0.0.1/secret", "http://169.254.169.254/latest/meta-data/?secret", "http://[::ffff:10.0.0.1]/"),
        *("http://0x7f.1/", "http://2130706433/", "file:///etc/passwd", "ftp://example.com/a", "data:image/png,x"),
        *("http://user:secret@example.com/", "http://127.0.0.1:22/", "//10.0.0.1/", "http://[::1", "javascript:secret"),
    ],
)
def test_redirect_targets_are_checked_like_urls(server: Server, target: str) -> None:
    server.routes["/go"] = respond(302, b"", Location=target)
    result = fetch_one(server.url("/go"))
    assert result.reason is Reason.fetch_refused
    assert result.detail.startswith("redirected: ")


def test_loopback_is_refused_by_default(server: Server) -> None:
    urls = [server.url("/a"), server.url("/a", "localhost"), server.url("/a", "[::1]")]
    results = fetch_all(urls, loopback=False)
    assert [result.reason for result in results] == [Reason.fetch_refused] * 3
    assert any("localhost resolves to" in result.detail for result in results)  # by its name, before any socket
    assert server.hits == []


def test_a_name_that_becomes_private_is_not_followed(server: Server) -> None:
    """DNS rebinding: the first name is public (here: loopback); a redirect leads to a private one."""
    lookups: list[str] = []

    async def lookup(host: str, port: int) -> list[Address]:
        lookups.append(host)
        inside = host == "inside.example" or lookups.count(host) > 1
        return answers("169.254.169.254" if inside else "127.0.0.1", port=port)

    server.routes["/a"] = respond(200, IMAGE)
    server.routes["/go"] = respond(302, b"", Location=server.url("/a", "inside.example"))
    urls = [*(server.url(f"/a?{n}", "rebinding.example") for n in range(5)), server.url("/go", "rebinding.example")]
    results = {result.url: result for result in asyncio.run(collect(urls, lookup=lookup))}
    # There is only one lookup: connections use the checked addresses, so a second DNS answer has no effect.
    assert [results[url].body for url in urls[:5]] == [IMAGE] * 5
    assert lookups == ["rebinding.example", "inside.example"]
    refused = results[urls[5]]
    assert refused.reason is Reason.fetch_refused
    assert "inside.example resolves to 169.254.169.254" in refused.detail
    assert all("inside" not in hit.headers["host"] for hit in server.hits)


def test_a_failed_name_lookup_is_retryable(server: Server) -> None:
    async def lookup(host: str, port: int) -> list[Address]:
        raise OSError(-2, "Name or service not known")

    (result,) = asyncio.run(collect(["http://nowhere.example/a?secret"], lookup=lookup))
    assert result.retryable
    assert "secret" not in result.detail


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 204, 206, 302, 304])
def test_a_permanent_failure_is_not_retried(server: Server, status: int) -> None:
    server.routes["/a"] = respond(status)
    result = fetch_one(server.url("/a"))
    assert (result.reason, result.detail, result.status) == (Reason.fetch_gone, f"HTTP {status}", status)
    assert server.counts["/a"] == 1


@pytest.mark.parametrize("failure", [respond(500), respond(503), respond(429), respond(408), CUT])
def test_a_temporary_failure_is_retried(server: Server, failure: Handler) -> None:
    server.routes["/a"] = in_turn(failure, failure, respond(200, IMAGE))
    assert fetch_one(server.url("/a"), retries=2).body == IMAGE
    assert server.counts["/a"] == 3
    server.counts.clear()
    assert fetch_one(server.url("/a"), retries=1).retryable
    assert server.counts["/a"] == 2


def test_a_connection_closed_without_an_answer_is_retried_a_limited_number_of_times(server: Server) -> None:
    server.routes["/a"] = raw(b"")
    result = fetch_one(server.url("/a?secret"), retries=2)
    assert result.retryable
    assert server.counts["/a"] <= 6  # the HTTP client itself tries twice


def test_all_requests_to_a_host_wait_for_retry_after(server: Server) -> None:
    times: list[float] = []

    async def timed(request: Any, writer: asyncio.StreamWriter) -> bool | None:
        times.append(time.monotonic())
        await asyncio.sleep(0.02)
        return await respond(200, IMAGE)(request, writer)

    server.routes["/a"] = in_turn(respond(429, b"", Retry_After="1"), respond(200, IMAGE))
    server.routes["/b"] = timed
    urls = [server.url("/a"), *(server.url(f"/b?{n}") for n in range(8))]
    began = time.monotonic()
    results = fetch_all(urls, per_host=2, retries=1)
    assert [result.body for result in results] == [IMAGE] * 9
    assert 1 <= time.monotonic() - began < 4
    pauses = [later - earlier for earlier, later in itertools.pairwise(sorted(times))]
    assert max(pauses, default=0) > 0.8 or times[0] - began > 0.8  # no request during the pause
    assert len([pause for pause in pauses if pause < 0.5]) >= len(pauses) - 1


def test_a_host_that_requests_a_long_pause_is_given_up(server: Server) -> None:
    server.routes["/a"] = respond(503, b"", Retry_After="7200")
    results = fetch_all([server.url(f"/a?{n}") for n in range(20)], per_host=1)
    assert all(result.retryable for result in results)
    assert server.counts["/a"] == 1
    assert "7200 s" in results[-1].detail


def test_a_dead_host_is_given_up_and_does_not_delay_others(server: Server) -> None:
    server.routes["/a"] = respond(200, IMAGE)
    dead = [f"http://127.0.0.2:{server.port}/{n}" for n in range(300)]  # nothing listens there
    results = {result.url: result for result in fetch_all([*dead, server.url("/a")], robots=False, concurrency=4)}
    assert results[server.url("/a")].body == IMAGE
    assert all(results[url].retryable for url in dead)
    given_up = [url for url in dead if "10 times" in results[url].detail]
    assert len(given_up) > 280


def test_pauses_grow_randomly_and_respect_retry_after() -> None:
    for tries in range(1, 12):
        drawn = [backoff(tries, None) for _ in range(200)]
        bound = min(politeness.LONGEST_PAUSE, politeness.FIRST_PAUSE * 2 ** (tries - 1))
        assert 0 <= min(drawn) < bound / 4
        assert bound * 3 / 4 < max(drawn) <= bound
    assert backoff(1, 30.0) == 30.0


def test_retry_after_is_a_number_or_a_date() -> None:
    assert parse_retry_after(" 120 ") == 120
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (parse_retry_after("Fri, 31 Dec 2399 23:59:59 GMT") or 0) > 1e9
    assert [parse_retry_after(value) for value in (None, "", "soon", "-5", "1.5")] == [None] * 5
    assert parse_retry_after("9" * 400) == 999_999_999


def test_robots_txt_is_fetched_once_and_obeyed(server: Server) -> None:
    server.routes["/robots.txt"] = respond(200, b"User-agent: mmflow\nDisallow: /private/\nAllow: /private/open")
    server.routes["/private/a"] = server.routes["/private/open"] = server.routes["/b"] = respond(200, IMAGE)
    urls = [server.url("/private/a"), server.url("/private/open"), *(server.url(f"/b?{n}") for n in range(10))]
    results = {result.url: result for result in fetch_all(urls)}
    assert results[urls[0]].reason is Reason.fetch_opted_out
    assert all(results[url].body == IMAGE for url in urls[1:])
    assert server.counts["/robots.txt"] == 1
    assert server.counts["/private/a"] == 0
    assert fetch_one(urls[0], robots=False).body == IMAGE


def test_robots_txt_of_a_redirect_target_is_obeyed(server: Server) -> None:
    server.routes["/robots.txt"] = in_turn(respond(404), respond(200, b"User-agent: *\nDisallow: /"))
    server.routes["/go"] = respond(301, b"", Location=server.url("/a", "localhost"))
    server.routes["/a"] = respond(200, IMAGE)
    assert fetch_one(server.url("/go")).reason is Reason.fetch_opted_out
    assert server.counts["/a"] == 0


@pytest.mark.parametrize(
    "no_rules", [respond(404), respond(403), respond(200, b"<html>"), respond(302, b"", Location="/robots.txt")]
)
def test_without_a_robots_txt_everything_is_allowed(server: Server, no_rules: Handler) -> None:
    server.routes["/robots.txt"] = no_rules
    server.routes["/a"] = respond(200, IMAGE)
    assert fetch_one(server.url("/a")).body == IMAGE


@pytest.mark.parametrize("broken", [respond(500), respond(429), CUT])
def test_nothing_is_fetched_while_robots_txt_is_unavailable(server: Server, broken: Handler) -> None:
    server.routes["/robots.txt"] = broken
    server.routes["/a"] = respond(200, IMAGE)
    results = fetch_all([server.url(f"/a?{n}") for n in range(30)], retries=2)
    assert all(result.retryable and result.detail.startswith("robots.txt: ") for result in results)
    assert {hit.path for hit in server.hits} == {"/robots.txt"}
    assert server.counts["/robots.txt"] == 3


def test_a_hostile_robots_txt_is_bounded(server: Server) -> None:
    rules = b"User-agent: *\nDisallow: /private\n"
    server.routes["/robots.txt"] = endless(server, head(200, Connection="close") + rules, b"Disallow: /%s\n" * 99)
    server.routes["/private"] = server.routes["/a"] = respond(200, IMAGE)
    results = {result.url: result for result in fetch_all([server.url("/private"), server.url("/a")])}
    assert results[server.url("/private")].reason is Reason.fetch_opted_out
    assert results[server.url("/a")].body == IMAGE
    assert server.sent < 20_000_000
    server.routes["/robots.txt"] = respond(302, b"", Location="http://10.0.0.1/robots.txt")
    assert fetch_one(server.url("/a")).reason is Reason.fetch_refused


@pytest.mark.parametrize(
    "headers",
    [{"X_Robots_Tag": "noindex, noai"}, {"X_Robots_Tag": "mmflow: noimageai"}, {"TDM_Reservation": "1"}],
)
def test_an_opt_out_is_obeyed_before_a_byte_is_read(server: Server, headers: dict[str, str]) -> None:
    first = head(200, Content_Length="60000000", **headers)
    server.routes["/a"] = endless(server, first, bytes(10_000), seconds=0.01)
    result = fetch_one(server.url("/a"), robots=False, max_bytes=100_000_000)
    assert (result.reason, result.body) == (Reason.fetch_opted_out, None)
    assert server.sent < 1_000_000
    server.routes["/a"] = respond(200, IMAGE, X_Robots_Tag="otherbot: noai", TDM_Reservation="0")
    assert fetch_one(server.url("/a")).body == IMAGE


def test_unchanged_bodies_are_not_sent_again(server: Server) -> None:
    async def conditional(request: Any, writer: asyncio.StreamWriter) -> bool | None:
        known = request.headers.get("if-none-match") == '"v1"' and request.headers.get("if-modified-since") == "then"
        answer = respond(304, ETag='"v1"') if known else respond(200, IMAGE, ETag='"v2"')
        return await answer(request, writer)

    server.routes["/a"] = conditional
    url = server.url("/a")
    (same,) = asyncio.run(collect([url], validators={url: Validators('"v1"', "then")}))
    assert (same.reason, same.body, same.status, same.etag, same.last_modified) == (None, None, 304, '"v1"', "then")
    (changed,) = asyncio.run(collect([url], validators={url: Validators('"v0"', None)}))
    assert (changed.body, changed.etag) == (IMAGE, '"v2"')
    server.routes["/a"] = respond(304, X_Robots_Tag="noai")
    (opted_out,) = asyncio.run(collect([url], validators={url: Validators('"v1"', "then")}))
    assert opted_out.reason is Reason.fetch_opted_out


def test_every_url_has_one_result_and_hosts_keep_their_limit(server: Server) -> None:
    async def slowly(request: Any, writer: asyncio.StreamWriter) -> bool | None:
        await asyncio.sleep(0.01)
        return await respond(200, request.path.encode())(request, writer)

    server.routes["/a"] = slowly
    urls = [server.url(f"/a?{n}") for n in range(60)]
    strange = ["", "no url", "http://10.0.0.1/", "mailto:a@b.example", "http://\ud800.example/", "\x00"]
    results = fetch_all([*urls, *strange, urls[0]], per_host=3, concurrency=40)
    assert sorted(result.url for result in results) == sorted([*urls, *strange, urls[0]])
    bodies = {result.url: result.body for result in results}
    assert all(bodies[url] == f"/a?{n}".encode() for n, url in enumerate(urls))
    assert all(result.reason is Reason.fetch_refused for result in results if result.url in strange)
    assert server.max_under_way == 3


def test_a_shared_redirect_target_keeps_its_host_limit(server: Server) -> None:
    under_way = max_under_way = 0

    async def lookup(host: str, port: int) -> list[Address]:
        return answers("127.0.0.1", port=port)

    async def target(request: Any, writer: asyncio.StreamWriter) -> bool | None:
        nonlocal under_way, max_under_way
        under_way += 1
        max_under_way = max(max_under_way, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return await respond(200, IMAGE)(request, writer)

    server.routes["/go"] = respond(302, b"", Location=server.url("/target", "target.example"))
    server.routes["/target"] = target
    urls = [server.url("/go", f"host{n}.example") for n in range(20)]
    results = asyncio.run(collect(urls, lookup=lookup, per_host=2))
    assert [result.body for result in results] == [IMAGE] * 20
    assert (under_way, max_under_way) == (0, 2)


def test_stopping_early_leaves_no_request_running(server: Server) -> None:
    server.routes["/a"] = respond(200, IMAGE)
    server.routes["/slow"] = silence
    urls = [server.url("/a"), *(server.url(f"/slow?{n}") for n in range(5))]

    async def first() -> tuple[Result, int]:
        batch = fetch_batch(urls, FetchConfig(loopback=True, robots=False, per_host=6))
        result = await anext(batch)
        await batch.aclose()
        return result, len(asyncio.all_tasks())

    began = time.monotonic()
    result, num_tasks = asyncio.run(first())
    assert (result.body, num_tasks) == (IMAGE, 1)
    assert time.monotonic() - began < 5


def test_a_bug_is_raised_instead_of_a_fetch_failure(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a fault")

    server.routes["/slow"] = silence
    monkeypatch.setattr("mmflow.fetch.client.parse_robots", broken)
    server.routes["/robots.txt"] = respond(200, b"")
    with pytest.raises(ZeroDivisionError, match="a fault"):
        fetch_all([server.url("/a"), server.url("/slow", "localhost")])


def test_bodies_get_memory_in_request_order() -> None:
    async def main() -> list[str]:
        budget, order = Budget(100), list[str]()

        async def body(name: str, size: int) -> None:
            held = await budget.take(size)
            order.append(name)
            await asyncio.sleep(0.001)
            budget.give(held)

        sizes = {"a": 60, "large": 100, "b": 10, "larger than all": 1_000, "c": 10}
        await asyncio.gather(*(body(name, size) for name, size in sizes.items()))
        return order

    assert asyncio.run(main()) == ["a", "large", "b", "larger than all", "c"]


def test_bodies_beyond_the_memory_budget_take_turns(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmflow.fetch.request.BODY_BUDGET", 25_000)
    server.routes["/a"] = respond(200, IMAGE)
    server.routes["/b"] = raw(head(200, Connection="close") + IMAGE)  # without a content length
    urls = [server.url(f"/{name}?{n}") for n in range(15) for name in "ab"]
    results = fetch_all(urls, per_host=10)
    assert [result.body for result in results] == [IMAGE] * 30
