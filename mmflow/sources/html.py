"""HTML pages: each image with its caption, and with the text of its section as a long caption."""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

from mmflow.core.listing import extension, open_stream, walk
from mmflow.sources.config import SourceConfig
from mmflow.sources.reasons import Reason, Rejected, malformed
from mmflow.sources.records import Fields, Kind, Record, Unit, attempt

PAGES_PER_UNIT = 200
MAX_PAGE_BYTES = 20 << 20
SECTION_WORDS = range(150, 20_000)  # more than that is a whole page, which each of its images would repeat
MAX_DEPTH = 500  # of nested elements; text of deeper ones counts as their ancestor's
VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)
UNREAD = frozenset(("script", "style", "noscript", "template", "svg", "math"))
# Open element → start tags that end it, as in browsers: few pages close these elements.
ENDED_BY = {
    "p": {"p", "div", "ul", "ol", "table", "section", "article", "figure", "h1", "h2", "h3", "h4"},
    "li": {"li"},
}
CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?([\w-]{1,40})""", re.IGNORECASE)


@dataclass(slots=True)
class Element:
    """An element of the page. Its text is `Page.text[start:end]`."""

    tag: str
    above: Element | None
    start: int
    end: int = -1
    caption: Element | None = None  # of a figure


@dataclass(slots=True)
class Picture:
    """An <img>: the address as written, the alternative text, and the element around it."""

    address: str
    alt: str
    within: Element


@dataclass(slots=True)
class Page:
    """The pieces of a page's text in order, and its images."""

    text: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=lambda: [0])  # the number of words before each piece, and in all
    pictures: list[Picture] = field(default_factory=list)
    base: str = ""


def list_pages(unit: Unit, source: SourceConfig) -> Iterator[Unit]:
    """The units of the pages below `unit.uri`."""
    names = [file.name for file in walk(unit.uri) if extension(file.name) in KIND.extensions]
    for number, start in enumerate(range(0, len(names), PAGES_PER_UNIT)):
        yield replace(unit, name=f"{unit.prefix}#{number}", files=tuple(names[start : start + PAGES_PER_UNIT]))


def read_pages(unit: Unit, source: SourceConfig) -> Iterator[Record]:
    """A record for each image of the pages; a page that cannot be read is one row with record_malformed."""
    for name in unit.files:
        label = unit.label(name)
        try:
            page = _read_page(unit, name)
        except Rejected as rejected:
            yield Record(label, rejected)
            continue
        for number, picture in enumerate(page.pictures, 1):
            yield Record(f"{label}:{number}", attempt(_fields, page, picture, name, label))


def _read_page(unit: Unit, name: str) -> Page:
    try:
        with open_stream(unit.uri, name) as stream:
            data = stream.read(MAX_PAGE_BYTES + 1)
        if len(data) > MAX_PAGE_BYTES:
            raise malformed(f"more than {MAX_PAGE_BYTES} bytes")
        return parse_page(data)
    except (FileNotFoundError, PermissionError) as error:
        raise malformed(f"cannot be read: {error.strerror}") from error
    except (AssertionError, ValueError) as error:  # raised by html.parser
        raise malformed(f"not HTML: {error}") from error


def parse_page(data: bytes) -> Page:
    """A page's text and images, decoded as the page says, else as UTF-8, else as Windows-1252, as old pages are."""
    charset = CHARSET.search(data[:4096])
    for encoding in ([charset[1].decode()] if charset else []) + ["utf-8-sig"]:
        try:
            text = data.decode(encoding)
            break
        except (UnicodeDecodeError, LookupError):
            continue
    else:
        text = data.decode("cp1252", "replace")
    parser = _Parser()
    parser.feed(text)
    parser.close()
    return parser.page


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self._open = [Element("", None, 0)]
        self._unread = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in UNREAD:
            self._unread += 1
        ended = self._open[-1].tag
        if tag in ENDED_BY.get(ended, ()):
            self._close_elements(len(self._open) - 1)
        if tag == "img" and not self._unread:
            values = {name: value or "" for name, value in attributes}
            # Pages that load images lazily have the address in data-src, and a placeholder in src.
            address = values.get("data-src") or values.get("src") or ""
            self.page.pictures.append(Picture(address.strip(), values.get("alt", ""), self._open[-1]))
        elif tag == "base" and not self.page.base:
            self.page.base = dict(attributes).get("href") or ""
        if tag not in VOID and len(self._open) < MAX_DEPTH:
            self._open.append(Element(tag, self._open[-1], len(self.page.text)))

    def handle_endtag(self, tag: str) -> None:
        if tag in UNREAD and self._unread:
            self._unread -= 1
        for place in range(len(self._open) - 1, 0, -1):
            if self._open[place].tag == tag:
                element = self._open[place]
                figure = _ancestor(element, "figure") if tag == "figcaption" else None
                if figure is not None:
                    figure.caption = element
                self._close_elements(place)
                return

    def handle_data(self, data: str) -> None:
        if not self._unread and (text := " ".join(data.split())):
            self.page.text.append(text)
            self.page.words.append(self.page.words[-1] + text.count(" ") + 1)

    def close(self) -> None:
        super().close()
        self._close_elements(0)

    def _close_elements(self, place: int) -> None:
        for element in self._open[place:]:
            element.end = len(self.page.text)
        del self._open[place:]


def text_of(page: Page, element: Element) -> str:
    """All text within an element, with white space collapsed."""
    return " ".join(page.text[element.start : element.end])


def section_of(page: Page, picture: Picture) -> str:
    """The text of the smallest element around an image that is long enough for a section; "" if that is too long."""
    section: Element | None = picture.within
    while section is not None and page.words[section.end] - page.words[section.start] < SECTION_WORDS.start:
        section = section.above
    if section is None or page.words[section.end] - page.words[section.start] not in SECTION_WORDS:
        return ""
    return text_of(page, section)


def _fields(page: Page, picture: Picture, name: str, label: str) -> Fields:
    figure = _ancestor(picture.within, "figure")
    caption = text_of(page, figure.caption) if figure is not None and figure.caption is not None else ""
    texts = [caption or " ".join(picture.alt.split()), section_of(page, picture)]
    fields = Fields(captions=[(None, text) for text in dict.fromkeys(texts) if text], metadata={"page": label})
    if picture.address.startswith("data:"):
        return replace(fields, bodies=[_inline(picture.address)])
    return replace(fields, images=[_image(picture.address, page.base, name)])


def _image(address: str, base: str, page: str) -> str:
    """The image's URL, or its path in the source; a leading slash means the source's own directory.

    Strangers write pages, so paths outside of the source are refused. Raises Rejected.
    """
    try:
        if base.startswith(("http://", "https://", "//")):
            address = urljoin(base, address)
        scheme = urlsplit(address).scheme
    except ValueError as error:
        raise malformed(f"{address[:200]!r}: not an address ({error})") from error
    if address.startswith("//"):
        return f"https:{address}"
    if scheme in ("http", "https"):
        return address
    path = unquote(address.partition("#")[0].partition("?")[0])
    if not path or scheme:
        raise Rejected(Reason.image_missing, f"{address[:200]!r}: not the address of an image")
    base = "" if base.startswith("/") else base
    folder = "" if path.startswith("/") else posixpath.join(posixpath.dirname(page), base)
    within = posixpath.normpath(posixpath.join(folder, path.lstrip("/")))
    if within.startswith("../"):
        raise Rejected(Reason.image_missing, f"{address[:200]!r}: outside of the source")
    return within


def _inline(address: str) -> bytes:
    """The body of a data: address."""
    head, _, body = address.partition(",")
    try:
        return base64.b64decode(unquote(body), validate=False) if head.endswith(";base64") else unquote(body).encode()
    except (binascii.Error, ValueError) as error:
        raise malformed(f"{head[:100]}: not base64 ({error})") from error


def _ancestor(element: Element, tag: str) -> Element | None:
    above: Element | None = element
    while above is not None and above.tag != tag:
        above = above.above
    return above


KIND = Kind(read=read_pages, extensions=("html", "htm", "xhtml"), units_of_folder=list_pages, may_name_urls=True)
