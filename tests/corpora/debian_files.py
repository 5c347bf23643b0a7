"""Debian packages made in a test."""

from __future__ import annotations


def ar(members: dict[str, bytes]) -> bytes:
    """An ar archive, which a .deb is."""
    body = b"!<arch>\n"
    for name, data in members.items():
        body += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return body
