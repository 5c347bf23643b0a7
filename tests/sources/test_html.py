"""Figures of HTML pages: captions, sections, and addresses that a page may not use."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from mmflow.sources import html as html_source
from mmflow.sources.html import parse_page
from tests.sources.reading import read, reasons, texts

LONG = " ".join(f"word{number}" for number in range(160))


def page(tmp_path: Path, html: str, name: str = "site/a/page.html") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html)
    return tmp_path / "site"


def test_a_figure_gets_its_caption_and_its_section(tmp_path: Path) -> None:
    site = page(
        tmp_path,
        f"""<html><head><title>no</title><script>var x = "<img src=no.jpg>";</script></head><body><p>Outside.
        <section><h2>Foxes</h2><p>{LONG}<figure><img src="img/fox%201.jpg?w=3#x" alt="alternative">
        <figcaption>A <b>red</b> fox</figcaption></figure></section>
        <div><img src=../b.png alt="  just
        alt "></div></body></html>""",
    )
    first, second = read(site, kind="html")
    assert (first["source"], first["images"]) == ("site/a/page.html:1", ["a/img/fox 1.jpg"])
    assert texts(first) == ["A red fox", f"Foxes {LONG} A red fox"]
    assert first["root"] == str(site)
    assert (second["images"], texts(second)[0]) == (["b.png"], "just alt")
    assert texts(second)[1].startswith("Outside. Foxes word0")
    assert {row["metadata"]["page"] for row in (first, second)} == {"site/a/page.html"}


def test_a_caption_before_its_image_and_a_page_without_sections(tmp_path: Path) -> None:
    site = page(tmp_path, "<figure><figcaption>Above</figcaption><a><img src='x.jpg'></a></figure><img src=y.jpg>")
    assert [texts(row) for row in read(site, kind="html")] == [["Above"], []]


@pytest.mark.parametrize(
    ("head", "src", "image"),
    [
        ("", "https://h/x.jpg", "https://h/x.jpg"),
        ("", "//h/x.jpg", "https://h/x.jpg"),
        ("", "/img/x.jpg", "img/x.jpg"),
        ("<base href='https://h/p/'>", "x.jpg", "https://h/p/x.jpg"),
        ("<base href='sub/'>", "x.jpg", "a/sub/x.jpg"),
        ("", "./../x.jpg", "x.jpg"),
    ],
)
def test_image_addresses_are_resolved(tmp_path: Path, head: str, src: str, image: str) -> None:
    (row,) = read(page(tmp_path, f"{head}<img src='{src}'>"), kind="html")
    assert row["images"] == [image]


@pytest.mark.parametrize(
    "src",
    ["../../etc/passwd", "/../x.jpg", "%2e%2e/../../x.jpg", "file:///etc/passwd", "javascript:x", "", "#", "C:/x"],
)
def test_addresses_outside_the_source_are_missing_images(tmp_path: Path, src: str) -> None:
    (row,) = read(page(tmp_path, f"<img src='{src}' alt=x>"), kind="html")
    assert (row["reason"], row["images"]) == ("image_missing", None)


def test_data_urls_are_image_bodies(tmp_path: Path) -> None:
    body = base64.b64encode(b"GIF89a").decode()
    site = page(tmp_path, f"<img src='data:image/gif;base64,{body}'><img src='data:image/gif;base64,x'>")
    rows = read(site, kind="html")
    assert (rows[0]["bodies"], rows[1]["reason"]) == ([b"GIF89a"], "record_malformed")


def test_lazy_images_are_found_by_data_src(tmp_path: Path) -> None:
    (row,) = read(page(tmp_path, "<img src='blank.gif' data-src='x.jpg'>"), kind="html")
    assert row["images"] == ["a/x.jpg"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("<p>grün".encode(), "grün"),
        ("<p>grün".encode("latin-1"), "grün"),
        ("<meta charset=windows-1251><p>лиса".encode("cp1251"), "лиса"),
        (b"<meta charset=nonsense><p>fox", "fox"),
        ("\ufeff<p>狐".encode(), "狐"),
    ],
)
def test_page_encodings_are_detected(data: bytes, text: str) -> None:
    assert parse_page(data).text == [text]


def test_a_page_that_is_too_large_is_a_rejected_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_source, "MAX_PAGE_BYTES", 100)
    page(tmp_path, "<img src=x.jpg>" + " " * 100)
    site = page(tmp_path, "<img src=x.jpg>", "site/b.html")
    assert reasons(read(site, kind="html")) == {"site/a/page.html": "record_malformed", "site/b.html:1": None}


def test_deep_nesting_takes_bounded_time(tmp_path: Path) -> None:
    site = page(tmp_path, "<div>" * 100_000 + "<img src=x.jpg alt=deep>" + "</div>" * 100_000)
    assert texts(read(site, kind="html")[0]) == ["deep"]
