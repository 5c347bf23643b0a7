"""What sites ask of robots, and how hosts are spared: robots.txt by RFC 9309, headers that opt out of machine learning,
and per-host limits: concurrent requests, pauses, and giving up on hosts that do not answer.

The standard library's parser of robots.txt takes the first rule that matches and knows no wildcards; RFC 9309 wants the
longest. protego 0.7 obeys groups of other robots ("mm") and misses rules for us under a copied user agent ("mmflow/2").
A host is a name, whatever its ports: the limits protect a machine and whoever pays for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import re
import string
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from mmflow.sources.reasons import Reason

MAX_ROBOTS_BYTES = 512 << 10  # RFC 9309 2.5: at least 500 KiB must be read
OPT_OUTS = frozenset(("noai", "noimageai", "noml"))
# Directives of X-Robots-Tag with a value after a colon; any other word before a colon names a robot.
VALUED = frozenset(("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"))
PRODUCT = re.compile(r"[A-Za-z0-9_-]+")
ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
PRINTABLE = string.ascii_letters + string.digits + string.punctuation

FIRST_PAUSE = 1.0  # seconds; doubled with each further try
LONGEST_PAUSE = 60.0  # seconds; a host that asks for more is left alone until the next run
# Tries in a row without an answer, or answered "not now", after which a host is left alone until the next run: a dead
# host of a thousand URLs would otherwise hold its tasks for hours.
MAX_MISSES = 10
MAX_HOSTS = 4_096  # remembered at once; those idle for longest are forgotten


@dataclass(frozen=True, slots=True)
class Rule:
    """An allow or disallow line: its path in one normal spelling, split at its stars; `end` if it ends with `$`."""

    allow: bool
    length: int  # octets of the path as written: the longest rule that matches decides
    parts: tuple[str, ...]
    end: bool

    def matches(self, path: str) -> bool:
        """Whether the rule is about a path, in linear time: as a regular expression, "*a*a*a…" takes for ever."""
        first, *others = self.parts
        if not path.startswith(first):
            return False
        if not others:
            return not self.end or len(path) == len(first)
        at = len(first)
        for part in others[:-1] if self.end else others:
            start = path.find(part, at)
            if start < 0:
                return False
            at = start + len(part)
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
        return max(((rule.length, rule.allow) for rule in self.rules if rule.matches(path)), default=(0, True))[1]


def product_token(user_agent: str) -> str:
    """Our name in robots.txt and X-Robots-Tag: "mmflow" for "mmflow/0 (…)", in lower case."""
    match = PRODUCT.match(user_agent)
    return match.group().lower() if match else "mmflow"


def parse_robots(body: bytes, robot: str) -> Robots:
    """The rules for the robot with this product token: of all groups that name it, else of all groups for "*"."""
    rules: dict[str, list[Rule]] = {"*": []}  # for this robot, if a group names it, and for all
    group: set[str] = set()  # which of the two the group being read names
    in_rules = False
    if len(body) >= MAX_ROBOTS_BYTES:  # cut within a line, "Disallow: /private" would become "Disallow: /"
        body = body[: max(body.rfind(b"\n", 0, MAX_ROBOTS_BYTES), 0)]
    for line in re.split(r"[\r\n]+", body.decode("utf-8-sig", "replace")):
        field, colon, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if not colon:
            continue
        if field == "user-agent":
            if in_rules:
                group, in_rules = set(), False
            # "mmflow/1.0" names mmflow: the standard wants the token alone, but sites copy whole user agents.
            match = PRODUCT.match(value)
            name = match.group().lower() if match else value
            if name in (robot, "*"):
                group.add(name)
                rules.setdefault(name, [])
        elif field in ("allow", "disallow"):
            in_rules = True
            for name in group if value else ():  # an empty path matches nothing
                rules[name].append(_rule(value, allow=field == "allow"))
    return Robots(tuple(rules.get(robot, rules["*"])))


def opt_out(x_robots_tags: Iterable[str], tdm_reservations: Iterable[str], robot: str) -> str | None:
    """The header that reserves a response from training, as a detail, or None.

    X-Robots-Tag: noai, noimageai or noml, without a name, for "*" or for this robot. TDM-Reservation: 1 (W3C's TDMRep).
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
    """In a rule's path, `*` is any run of characters, `$` at the end is the end, and any other `$` is itself."""
    normal = _normal(path)
    parts = tuple(normal.removesuffix("$").replace("$", "%24").split("*"))
    return Rule(allow, len(normal), parts, normal.endswith("$"))


def _normal(path: str) -> str:
    """One spelling of a path: escapes only where needed, as %XX in upper case (RFC 9309 2.2.2)."""

    def unescape(escape: re.Match[str]) -> str:
        character = chr(int(escape.group(1), 16))
        return character if character in UNRESERVED else escape.group().upper()

    return ESCAPE.sub(unescape, quote(path, safe=PRINTABLE))


# --- hosts ------------------------------------------------------------------------------------------------------------


class Host:
    """What is known of one host during a run."""

    def __init__(self, per_host: int) -> None:
        self.slots = asyncio.Semaphore(per_host)
        self.robots: dict[str, Robots | tuple[Reason, str]] = {}  # origin → its rules, or why they are not available
        self.robots_lock = asyncio.Lock()
        self.users = 0  # URLs in progress that may touch it
        self.closed: str | None = None  # why it is left alone
        self._ready = 0.0
        self._misses = 0

    async def pause(self) -> None:
        """Wait for as long as the host asked us to."""
        while (seconds := self._ready - time.monotonic()) > 0:
            await asyncio.sleep(seconds)

    def answered(self) -> None:
        """Note an answer other than "not now"."""
        self._misses = 0

    def missed(self, seconds: float | None = None) -> None:
        """Note that there was no answer, or "not now", perhaps with a pause in seconds."""
        self._misses += 1
        if seconds is not None and seconds > LONGEST_PAUSE:
            self.closed = f"the host asked for a pause of {seconds:.0f} s"
        elif self._misses >= MAX_MISSES:
            self.closed = f"the host gave no answer {MAX_MISSES} times in a row"
        elif seconds is not None:
            self._ready = max(self._ready, time.monotonic() + seconds)


class Hosts:
    """The hosts of a run, bounded in number."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: OrderedDict[str, Host] = OrderedDict()

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Host]:
        """A host, which is not forgotten within the block."""
        host = self._hosts.get(name) or self._hosts.setdefault(name, Host(self._per_host))
        self._hosts.move_to_end(name)
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if len(self._hosts) > MAX_HOSTS:
                oldest = next(iter(self._hosts))
                if self._hosts[oldest].users:
                    self._hosts.move_to_end(oldest)
                else:
                    del self._hosts[oldest]


def backoff(tries: int, retry_after: float | None) -> float:
    """Seconds until the next try, drawn from 0 up to the pause so that tries do not align, but at least `retry_after`.

    Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    drawn = random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)))
    return max(drawn, retry_after or 0.0)


def parse_retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date (RFC 9110 10.2.3); None for anything else."""
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
