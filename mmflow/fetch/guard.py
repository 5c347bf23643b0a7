"""Which addresses a fetch may talk to: a list of URLs written by strangers must not steer requests inside.

A URL is checked as text (`parse_url`), its name when it is resolved (`GuardedResolver`), and the address once more when
its socket is made (`guarded_socket`): a name that resolves differently a second time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from mmflow.sources.reasons import Reason, Rejected

NO_URL = (ValueError, IndexError)  # what yarl raises, IndexError for "0://[]@"
MAX_URL = 8_000  # characters: about what servers take in a request line
# Web ports, and ports that anyone may listen on, without those on which browsers refuse to speak HTTP
# (https://fetch.spec.whatwg.org/#port-blocking): a request there is a command to a mail, chat or file server.
WEB_PORTS = (80, 443)
FIRST_OPEN_PORT = 1024
BLOCKED_PORTS = frozenset(
    (1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080)
)
HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_])?\.?")
# The URL standard's "ends in a number": such a host is an IPv4 address in some spelling, like 0x7f.1 and 2130706433.
NUMERIC = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?")

# Listed here because `ipaddress.is_global` changed its answers between patch releases of Python (3.11.10): IANA's
# special-purpose registry, reserved networks, and multicast. 100.64/10 is carrier-grade NAT and Alibaba's metadata
# server, 168.63.129.16 a public address where Azure's platform answers inside every virtual machine, 169.254/16 the
# metadata server of most clouds.
CLOSED_IPV4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
            *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")  # all that IANA has assigned; everything outside is special
# Protocol assignments (with Teredo and ORCHID), documentation, 6to4 (IPv4 in disguise, retired by RFC 7526).
CLOSED_IPV6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
# DNS64 resolves names with IPv4 addresses only into this network: the address within decides.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = tuple[int, int, int, str, tuple[Any, ...]]  # as socket.getaddrinfo returns them
Lookup = Callable[[str, int], Awaitable[Sequence[Address]]]
"""Host and port to addresses; raises OSError where there are none."""


class AddressRefusedError(OSError):
    """A name or a connection leads to an address that must not be contacted."""


def is_admitted(address: str, *, loopback: bool = False) -> bool:
    """Whether a numeric IP address is on the public internet; with `loopback`, also whether it is this machine's."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip.ipv4_mapped is None and ip not in NAT64:
            public = ip in GLOBAL_IPV6 and not any(ip in network for network in CLOSED_IPV6)
            return public or (loopback and ip.is_loopback)
        loopback = loopback and ip.ipv4_mapped is not None  # beyond a NAT64 it is the gateway's own loopback
        ip = ip.ipv4_mapped or ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return (loopback and ip.is_loopback) or not any(ip in network for network in CLOSED_IPV4)


def parse_url(text: str, *, loopback: bool = False) -> URL:
    """The URL to request, without its fragment. Raises Rejected with fetch_refused; no detail repeats the URL.

    Ports are 80, 443 and from 1024 on, without those that browsers block. An address in an odd spelling (decimal,
    octal, hexadecimal, short) is refused whatever it means: no page uses them, and parsers disagree about them.
    """
    if len(text) > MAX_URL:
        raise _refused(f"URL of {len(text)} characters, at most {MAX_URL} are allowed")
    try:
        url = URL(text.strip()).with_fragment(None)
        host, port = url.raw_host, url.port
    except NO_URL as error:
        raise _refused("not a URL") from error
    if url.scheme not in ("http", "https"):
        raise _refused(f"scheme {url.scheme[:20]!r}, http or https is needed")
    if url.raw_user is not None or url.raw_password is not None:
        raise _refused("user name or password in the URL")
    if not host:
        raise _refused("no host in the URL")
    if port is None or not (port in WEB_PORTS or port >= FIRST_OPEN_PORT) or port in BLOCKED_PORTS:
        raise _refused(f"port {port} is not a web server's")
    if ":" not in host and not HOST.fullmatch(host):
        raise _refused(f"host {host[:80]!r} is not a name")
    if ":" in host or _is_canonical_ipv4(host):
        if not is_admitted(host, loopback=loopback):
            raise _refused(f"{host} is not a public address")
    elif NUMERIC.fullmatch(host):
        raise _refused(f"{host[:80]} is an address in an odd spelling")
    return url


def _is_canonical_ipv4(host: str) -> bool:
    try:
        return str(ipaddress.IPv4Address(host)) == host
    except ValueError:
        return False


def _refused(detail: str) -> Rejected:
    return Rejected(Reason.fetch_refused, detail)


class GuardedResolver(AbstractResolver):
    """Resolves names for aiohttp to admitted addresses, which are the ones connected to.

    A name is refused (AddressRefusedError) if any of its addresses is: a public one may be there only to pass a check.
    `lookup` replaces the system's resolver.
    """

    def __init__(self, *, loopback: bool = False, num_threads: int = 16, lookup: Lookup | None = None) -> None:
        self._loopback = loopback
        self._lookup = lookup or self._ask_system
        # A pool of its own: asyncio's has a handful of threads, and a few dead name servers can block them all.
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="lookup")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a host. Raises OSError if it has none, or one that is refused."""
        results: list[ResolveResult] = []
        for kind, _, protocol, _, address in await self._lookup(host, port):
            number = str(address[0]) if not (kind == socket.AF_INET6 and address[3]) else f"{address[0]}%{address[3]}"
            if not is_admitted(number, loopback=self._loopback):
                raise AddressRefusedError(f"{host} resolves to {number}, which is not a public address")
            if family in (socket.AF_UNSPEC, kind):
                flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
                result = ResolveResult(hostname=host, host=number, port=port, family=kind, proto=protocol, flags=flags)
                results.append(result)
        if not results:
            raise OSError(f"{host} has no address")
        return results

    async def close(self) -> None:
        """Let the threads go without waiting for lookups that hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask_system(self, host: str, port: int) -> Sequence[Address]:
        def ask() -> Sequence[Address]:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)

        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)


def guarded_socket(*, loopback: bool = False) -> Callable[[Address], socket.socket]:
    """aiohttp's `socket_factory`: the last check, of the very address that is connected to."""

    def make(address: Address) -> socket.socket:
        family, kind, protocol, _, where = address
        if not is_admitted(str(where[0]), loopback=loopback):
            raise AddressRefusedError(f"{where[0]} is not a public address")
        return socket.socket(family, kind, protocol)

    return make
