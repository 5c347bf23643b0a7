"""URLs, names and redirects lead only to the public internet."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmflow.fetch.guard import (
    Address,
    AddressRefusedError,
    GuardedResolver,
    guarded_socket,
    is_admitted,
    parse_url,
)
from mmflow.sources.reasons import Reason, Rejected

CLOSED = [
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "169.254.169.254"),
    *("168.63.129.16", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1"),
    *("240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0"),
    *("fc00::1", "fd00:ec2::254", "fec0::1"),
    *("ff02::1", "2001:db8::1", "3fff::1", "5f00::1", "100::1"),
    *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "::10.0.0.1", "::8.8.8.8"),  # IPv4-mapped, IPv4-compatible
    *("64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1"),  # NAT64 of private addresses, a local NAT64
    *("2002:a00:1::", "2002:808:808::1", "2001:0:a00:1::1", "2001::1"),  # 6to4, Teredo
    *("", "example.com", "8.8.8", "010.8.8.8", "8.8.8.8.8", "0x8.8.8.8"),
]
OPEN = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
LOOPBACK = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"]


def refusal(url: str, *, loopback: bool = False) -> str:
    with pytest.raises(Rejected) as caught:
        parse_url(url, loopback=loopback)
    assert caught.value.reason is Reason.fetch_refused
    return caught.value.detail


def answers(*addresses: str, port: int = 80) -> list[Address]:
    """DNS answers with these addresses."""
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
        if ":" in address
        else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
        for address in addresses
    ]


@pytest.mark.parametrize("address", [*CLOSED, *OPEN])
def test_only_public_addresses_are_admitted(address: str) -> None:
    assert is_admitted(address) == (address in OPEN)


@pytest.mark.parametrize("address", [*CLOSED, *LOOPBACK, "64:ff9b::7f00:1"])
def test_loopback_admits_this_machine_and_no_other_private_address(address: str) -> None:
    assert is_admitted(address, loopback=True) == (address in LOOPBACK or address.startswith("127."))


@given(st.ip_addresses())
def test_admitted_addresses_are_global(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if not is_admitted(str(ip)):
        return
    if isinstance(ip, ipaddress.IPv6Address) and str(ip).startswith(("::ffff:", "64:ff9b::")):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    assert ip.is_global
    assert not ip.is_multicast
    assert not ip.is_reserved


@given(st.ip_addresses(v=4), st.sampled_from([0xFFFF << 32, 0x64FF9B << 96]))
def test_an_embedded_ipv4_address_is_treated_like_the_plain_one(ip: ipaddress.IPv4Address, prefix: int) -> None:
    assert is_admitted(str(ipaddress.IPv6Address(prefix | int(ip)))) == is_admitted(str(ip))


@given(st.ip_addresses(v=4), st.integers(0, 2**96 - 1))
def test_neither_6to4_nor_teredo_nor_compatible_forms_are_admitted(ip: ipaddress.IPv4Address, rest: int) -> None:
    assert not is_admitted(str(ipaddress.IPv6Address(0x2002 << 112 | int(ip) << 80 | rest >> 16)))
    assert not is_admitted(str(ipaddress.IPv6Address(0x20010000 << 96 | rest)))
    assert not is_admitted(str(ipaddress.IPv6Address(int(ip))))


@given(st.ip_addresses(v=4), st.sampled_from(["{0}", "{0:#x}", "{1:#o}.{2}", "{1:#x}.{2:#x}", "0{1:o}.{3}", "{0}."]))
def test_an_address_in_an_unusual_spelling_is_refused(ip: ipaddress.IPv4Address, spelling: str) -> None:
    number = int(ip)
    host = spelling.format(number, number >> 24, number & 0xFFFFFF, str(ip).partition(".")[2]).replace("0o", "0")
    refusal(f"http://{host}/", loopback=True)


@example("0://[]@")
@given(st.text(max_size=60) | st.text("0123456789.xabcdef:[]@/%#?\\ ", max_size=40).map(lambda rest: f"http://{rest}"))
def test_any_text_is_a_url_to_a_name_or_public_address_or_refused(text: str) -> None:
    try:
        url = parse_url(text)
    except Rejected:
        return
    host = url.raw_host or ""
    assert url.scheme in ("http", "https")
    assert url.raw_user is None
    assert host.isascii()
    assert is_admitted(host) or not is_system_address(host)


def is_system_address(host: str) -> bool:
    """Whether the system would connect to the host as an address, without a name lookup."""
    with contextlib.suppress(OSError):
        socket.inet_aton(host)
        return True
    return False


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("file:///etc/passwd", "scheme"),
        ("gopher://example.com/", "scheme"),
        ("//example.com/a.jpg", "scheme"),
        ("http://user:secret@example.com/", "user name"),
        ("http://secret@example.com/", "user name"),
        ("http:///a.jpg", "no host"),
        ("http://example.com:22/", "port 22"),
        ("http://example.com:6667/", "port 6667"),
        ("http://example.com:0/", "port 0"),
        ("http://example.com:99999/", "not a URL"),
        ("http://127.0.0.1\\@example.com/", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://127.0.0.1/", "not a public address"),
        ("http://[::ffff:169.254.169.254]/latest/", "not a public address"),
        ("http://[fe80::1%25eth0]/", "not a public address"),
        ("http://127。0。0。1/", "not a public address"),
        ("http://①②⑦.0.0.1/", "not a public address"),
        ("http://a b.example/", "not a name"),
        ("http://example%2ecom/", "not a name"),
        ("http://example.com/" + "a" * 9_000, "characters"),
    ],
)
def test_the_message_of_a_refused_url_does_not_repeat_it(url: str, detail: str) -> None:
    message = refusal(url)
    assert detail in message
    assert "secret" not in message
    assert len(message) < 120


def test_a_good_url_is_kept_without_its_fragment() -> None:
    assert str(parse_url(" https://Example.com:8443/a%20b.jpg?sig=%2B+c#top\n")) == (
        "https://example.com:8443/a%20b.jpg?sig=%2B+c"
    )
    assert parse_url("http://bücher.example/ü.png").raw_host == "xn--bcher-kva.example"


def test_names_resolve_only_to_admitted_addresses() -> None:
    async def resolve(*addresses: str) -> list[str]:
        async def lookup(host: str, port: int) -> list[Address]:
            return answers(*addresses)

        resolver = GuardedResolver(lookup=lookup)
        hosts = [result["host"] for result in await resolver.resolve("a.example", 80)]
        await resolver.close()
        return hosts

    assert asyncio.run(resolve("8.8.8.8", "2606:4700::1111")) == ["8.8.8.8", "2606:4700::1111"]
    for inside in ("10.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe"):
        with pytest.raises(AddressRefusedError, match=r"a\.example resolves to .* not a public address"):
            asyncio.run(resolve("8.8.8.8", inside))  # even beside a public address
    with pytest.raises(OSError, match="no address"):
        asyncio.run(resolve())


def test_no_socket_is_created_for_a_private_address() -> None:
    make = guarded_socket()
    for address in answers("127.0.0.1", "10.0.0.1", "::1", "::ffff:10.0.0.1"):
        with pytest.raises(AddressRefusedError):
            make(address)
    make(answers("8.8.8.8")[0]).close()
    guarded_socket(loopback=True)(answers("127.0.0.1")[0]).close()
