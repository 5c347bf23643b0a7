"""What a site asks of robots: robots.txt by RFC 9309, and the headers that opt a body out of machine learning.

The standard library's parser takes the first rule that fits and knows no wildcards; RFC 9309 wants the longest.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

MAX_ROBOTS_BYTES = 512 << 10  # RFC 9309 2.5: at least 500 KiB are read; what follows is not
OPT_OUTS = frozenset(("noai", "noimageai", "noml"))
# Directives of X-Robots-Tag that have a value behind a colon, where any other word before a colon names a robot.
VALUED = frozenset(("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"))
PRODUCT = re.compile(r"[A-Za-z0-9_-]+")
ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
PRINTABLE = string.ascii_letters + string.digits + string.punctuation


@dataclass(frozen=True, slots=True)
class Rule:
    """One allow or disallow line: `path` in its one spelling, cut at its stars; `end` where a `$` closes it."""

    allow: bool
    length: int  # octets of the path as written: the longest rule that fits decides
    parts: tuple[str, ...]
    end: bool

    def fits(self, path: str) -> bool:
        """Whether the rule speaks of a path. In linear time, where "*a*a*a…" as a regular expression takes for ever."""
        first, *others = self.parts
        if not path.startswith(first):
            return False
        if not others:
            return not self.end or len(path) == len(first)
        at = len(first)
        for part in others[:-1] if self.end else others:
            found = path.find(part, at)
            if found < 0:
                return False
            at = found + len(part)
        return not self.end or (path.endswith(others[-1]) and len(path) - len(others[-1]) >= at)


@dataclass(frozen=True, slots=True)
class Robots:
    """The rules of one robots.txt for one robot."""

    rules: tuple[Rule, ...] = ()

    def allows(self, path: str) -> bool:
        """Whether a path with its query, as sent, may be fetched: the longest rule decides, at equal length allow."""
        if path == "/robots.txt":
            return True
        path = _normal(path).replace("*", "%2A").replace("$", "%24")
        fitting = [(rule.length, rule.allow) for rule in self.rules if rule.fits(path)]
        return max(fitting)[1] if fitting else True


def product_token(user_agent: str) -> str:
    """The name by which robots.txt and X-Robots-Tag address us: "mmflow" of "mmflow/0 (…)", lower-case."""
    found = PRODUCT.match(user_agent)
    return found.group().lower() if found else "mmflow"


def parse_robots(body: bytes, robot: str) -> Robots:
    """The rules for the robot of this product token: all groups that name it, else all that name "*"."""
    named: list[Rule] = []
    general: list[Rule] = []
    is_named = False
    robots: set[str] = set()  # of the group being read
    in_rules = False
    if len(body) >= MAX_ROBOTS_BYTES:  # cut within a line, "Disallow: /private" would become "Disallow: /"
        body = body[: max(body.rfind(b"\n", 0, MAX_ROBOTS_BYTES), 0)]
    text = body.decode("utf-8-sig", "replace")
    for line in re.split(r"[\r\n]+", text):
        field, colon, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if not colon:
            continue
        if field == "user-agent":
            if in_rules:
                robots, in_rules = set(), False
            # "mmflow/1.0" names mmflow: sites copy whole user agents, though the standard wants the token alone.
            robots.add("*" if value == "*" else product_token(value) if PRODUCT.match(value) else "")
            is_named = is_named or robot in robots
        elif field in ("allow", "disallow"):
            in_rules = True
            if value:  # an empty path fits nothing
                rule = _rule(value, allow=field == "allow")
                if robot in robots:
                    named.append(rule)
                if "*" in robots:
                    general.append(rule)
    return Robots(tuple(named if is_named else general))


def opt_out(x_robots_tags: Iterable[str], tdm_reservations: Iterable[str], robot: str) -> str | None:
    """The header that reserves a response from training, for a detail, or None.

    X-Robots-Tag: noai, noimageai or noml, bare, for "*" or for this robot. TDM-Reservation: 1 (W3C's TDMRep).
    """
    for header in x_robots_tags:
        addressed = True
        for directive in header.split(","):
            name, colon, rest = directive.partition(":")
            if colon and name.strip().lower() not in VALUED:
                addressed = name.strip().lower() in ("*", robot)
                directive = rest
            if addressed and directive.strip().lower() in OPT_OUTS:
                return f"X-Robots-Tag: {directive.strip().lower()}"
    for header in tdm_reservations:
        if "1" in (part.strip() for part in header.split(",")):
            return "TDM-Reservation: 1"
    return None


def _rule(path: str, *, allow: bool) -> Rule:
    """A rule's path: `*` is any run of characters, `$` at the end is the end, and any other `$` itself."""
    normal = _normal(path)
    end = normal.endswith("$")
    return Rule(allow, len(normal), tuple(normal.removesuffix("$").replace("$", "%24").split("*")), end)


def _normal(path: str) -> str:
    """One spelling of a path: what needs no escape has none, all else is %XX in upper case (RFC 9309 2.2.2)."""
    return ESCAPE.sub(_unescape, quote(path, safe=PRINTABLE))


def _unescape(escape: re.Match[str]) -> str:
    character = chr(int(escape.group(1), 16))
    return character if character in UNRESERVED else escape.group().upper()
