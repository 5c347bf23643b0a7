"""robots.txt by RFC 9309, and the opt-out headers."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.fetch.politeness import MAX_ROBOTS_BYTES, opt_out, parse_robots, product_token


def allows(text: str, path: str, robot: str = "mmflow") -> bool:
    return parse_robots(text.encode(), robot).allows(path)


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("Disallow: /", "/a.jpg", False),
        ("Disallow:", "/a.jpg", True),
        ("", "/a.jpg", True),
        ("Disallow: /private", "/private.html", False),
        ("Disallow: /private/", "/private", True),
        ("Disallow: /\nAllow: /public/", "/public/a.jpg", True),  # the longest rule, not the first
        ("Allow: /\nDisallow: /images/", "/images/a.jpg", False),
        ("Disallow: /page\nAllow: /page", "/page", True),  # at equal length, allow
        ("Disallow: /*.gif$", "/a/b.gif", False),
        ("Disallow: /*.gif$", "/a/b.gif?x=1", True),
        ("Disallow: /*.gif", "/a/b.gif?x=1", False),
        ("Disallow: /a*b*c", "/a-b-c-d", False),
        ("Disallow: /a*b*c", "/a-c-b", True),
        ("Disallow: /a*a$", "/a", True),
        ("Disallow: /a*a$", "/aa", False),
        ("Disallow: *secret", "/x/secret/y", False),
        ("Disallow: /fish$", "/fish", False),
        ("Disallow: /fish$", "/fishes", True),
        ("Disallow: /a?b", "/a?b=1", False),
        ("Disallow: /%7Ejoe", "/~joe/a.png", False),
        ("Disallow: /ü", "/%c3%bc.png", False),
        ("Disallow: /a%2fb", "/a/b", True),  # an escaped slash is not a slash
        ("Disallow: /a%2Ab", "/a*b", False),  # an escaped star is a star and no wildcard
        ("Disallow: /a%2Ab", "/axb", True),
        ("disallow : /x # why", "/x", False),
        ("Crawl-delay: 10\nDisallow: /x", "/x", False),
        ("Disallow: /robots.txt", "/robots.txt", True),
    ],
)
def test_rules_match_their_paths(rules: str, path: str, allowed: bool) -> None:
    assert allows(f"User-agent: *\n{rules}\n", path) is allowed


def test_a_group_that_names_us_replaces_the_general_one() -> None:
    text = "User-agent: *\nDisallow: /\n\nUser-Agent: Other\nUser-agent: MMflow\nDisallow: /no\n"
    assert allows(text, "/yes")
    assert not allows(text, "/no")
    assert not allows(text, "/yes", "third")


def test_all_groups_that_name_us_count_as_one() -> None:
    text = "User-agent: mmflow\nDisallow: /a\n\nUser-agent: b\nDisallow: /b\n\nUser-agent: mmflow/2.0\nDisallow: /c"
    assert [allows(text, path) for path in ("/a", "/b", "/c")] == [False, True, False]


def test_a_robot_name_with_our_prefix_is_not_ours() -> None:
    assert allows("User-agent: mmflowbot\nDisallow: /", "/a")
    assert allows("User-agent: mm\nDisallow: /", "/a")


def test_rules_outside_a_group_and_html_pages_forbid_nothing() -> None:
    assert allows("Disallow: /\n", "/a")
    assert allows("<html><body>User-agent: everyone</body></html>", "/a")


def test_line_ends_byte_order_marks_and_invalid_utf8_are_accepted() -> None:
    assert not parse_robots(b"\xef\xbb\xbfUser-agent: *\r\rDisallow: /a\r\n\xff\xfe: \x00\n", "mmflow").allows("/a")


@pytest.mark.parametrize("comment", range(12, 20))
def test_bytes_past_the_limit_are_not_read_and_no_line_is_cut(comment: int) -> None:
    head = b"User-agent: *\nDisallow: /a\n"
    body = head + b"#" * (MAX_ROBOTS_BYTES - len(head) - comment) + b"\nDisallow: /b\n"
    robots = parse_robots(body, "mmflow")
    assert [robots.allows(path) for path in ("/a", "/b", "/c")] == [False, len(body) > MAX_ROBOTS_BYTES, True]


@pytest.mark.parametrize(
    "body",
    [b"User-agent: *\nDisallow: /" + b"*a" * 200 + b"b$\n", b"User-agent: a%d\n" * 15_000 + b"Disallow: /\n" * 20_000],
    ids=["pattern", "group"],
)
def test_a_hostile_file_is_parsed_quickly(body: bytes) -> None:
    body = re.sub(rb"%d", lambda match: b"%x" % match.start(), body)  # names that differ
    began = time.process_time()
    assert parse_robots(body, "mmflow").allows("/" + "a" * 7_000)
    assert time.process_time() - began < 1


@given(st.binary(max_size=300), st.text("/ab*$%2F?é", min_size=1, max_size=12))
def test_any_bytes_can_be_parsed(body: bytes, path: str) -> None:
    assert parse_robots(b"User-agent: *\nDisallow: " + body, "mmflow").allows(f"/{path}") in (True, False)


@given(st.text("/ab.", max_size=8), st.text("/ab.", max_size=8))
def test_a_plain_path_is_a_prefix(rule: str, path: str) -> None:
    assert allows(f"User-agent: *\nDisallow: /{rule}", f"/{path}") is not f"/{path}".startswith(f"/{rule}")


def test_the_first_word_of_the_user_agent_is_our_name() -> None:
    assert product_token("mmflow/0 (a builder)") == "mmflow"
    assert product_token("Our-Bot2 +https://example.com") == "our-bot2"


@pytest.mark.parametrize(
    ("tags", "reservations", "header"),
    [
        (["noai"], [], "X-Robots-Tag: noai"),
        (["noindex, NoImageAI"], [], "X-Robots-Tag: noimageai"),
        (["noml"], [], "X-Robots-Tag: noml"),
        (["mmflow: noai"], [], "X-Robots-Tag: noai"),
        (["*: noai"], [], "X-Robots-Tag: noai"),
        (["otherbot: noindex", "mmflow: nofollow, noai"], [], "X-Robots-Tag: noai"),
        (["otherbot: noai, noml"], [], None),
        (["otherbot: nofollow, mmflow: noai"], [], "X-Robots-Tag: noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], [], "X-Robots-Tag: noai"),
        (["max-image-preview: large, noai"], [], "X-Robots-Tag: noai"),
        (["noindex, nofollow, noarchive"], [], None),
        (["noaiming"], [], None),
        ([], ["1"], "TDM-Reservation: 1"),
        ([], [" 1 "], "TDM-Reservation: 1"),
        ([], ["0"], None),
        ([], [], None),
    ],
)
def test_opt_out_headers_that_address_us_are_recognised(
    tags: list[str], reservations: list[str], header: str | None
) -> None:
    assert opt_out(tags, reservations, "mmflow") == header
