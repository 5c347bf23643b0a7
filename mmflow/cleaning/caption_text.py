"""A caption's text as people meant it: entities and markup undone, one Unicode form, nothing invisible."""

from __future__ import annotations

import html
import html.entities
import re
import unicodedata

# Zero-width joiners spell words in Persian and the Indic scripts and join emoji; between ASCII they only hide things.
IDLE_JOINER = re.compile("(?<![^\\s\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\\s\x00-\x7f])")
JOINERS = "\u200c\u200d"
# With the semicolon only: "R&D", "?a=1&copy=2" and "AT&T" are no entities.
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# An ampersand that was escaped again and again, as scraped captions are.
AMPERSANDS = re.compile(r"&(?:(?:amp|AMP|#0{0,5}38|#[xX]0{0,4}26);)+")
# The markup of running text, and no other: "a < b", "<3" and "<unknown>" are what somebody wrote. An attribute needs
# its "=", so that "x <b and c> y" stays. What breaks a line parts words; the rest may stand within one: H<sub>2</sub>O.
ATTRIBUTES = r"""(?:\s+[a-zA-Z-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>=]+))*"""
BREAKING = "br|p|div|li|ul|ol|hr|tr|td|th|table|h[1-6]|blockquote|figure|figcaption|img"
INLINE = "b|i|u|em|strong|span|a|font|small|big|sub|sup|center|cite|abbr|mark|q|s|code"
BREAKING_TAG = re.compile(rf"</?(?:{BREAKING}){ATTRIBUTES}\s*/?>", re.IGNORECASE)
INLINE_TAG = re.compile(rf"</?(?:{INLINE}){ATTRIBUTES}\s*/?>", re.IGNORECASE)
MAX_ROUNDS = 3

# Alone, these say that there is a picture and nothing of what is in it.
EMPTY_WORDS = (
    "images?|photos?|photograph|pictures?|pic|img|fig(?:ure)?|thumbnail|placeholder|untitled|unnamed"
    "|no (?:title|caption|description|name|alt(?: text)?)(?: available)?|alt(?: text)?|null|none|undefined|n/a"
    "|图片|照片|画像|写真|无标题|無題|bild|foto|imagen|imagem|immagine|фото|изображение"
    "|ohne titel|sans titre|sin título|senza titolo|sem título|без названия"
)
BOILERPLATE = re.compile(
    rf"(?:an? |the )?(?:{EMPTY_WORDS})(?: of(?: an?| the)?)?[\s_#(-]*\d*\)?[\s.:!…-]*"
    # What cameras, telephones and screenshots call their files.
    r"|(?:img|dsc[nf]?|pict?|mvi|gopr|dji|pxl|sam|cimg|hpim|imgp|vid|scan|image|photo)[\s_-]?\d[\d_\s-]*(?:\(\d+\))?"
    r"|p\d{7}|(?:screenshot|screen shot|whatsapp image)[\s_-][\d\s_.:-]*(?:at [\d.:]+)?(?: [ap]m)?"
    # Hashes and UUIDs.
    r"|[0-9a-f]{16,128}|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}",
    re.IGNORECASE,
)
MOST_SPACES = 5  # of these; a caption of more words is not looked at
IMAGES = ["jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "svg", "avif", "heic", "eps", "psd", "ico", "nef"]
EXTENSIONS = frozenset([*IMAGES, "cr2", "mp4", "mov"])
MOST_SPACES_OF_NAME, MAX_NAME = 3, 130  # a sentence too may end in a file's name


def clean_text(text: str) -> str:
    """NFC, single spaces, no control, format or unpaired surrogate characters, entities and markup undone.

    Escapes and markup may hide one another, or what `_plain` takes out, so they are undone until nothing is left of
    them. What does not come to rest within `MAX_ROUNDS` was not escaped but made up: it stays as it was.
    """
    text = plain = _plain(text)
    for _ in range(MAX_ROUNDS + 1):
        before = text
        if "&" in text:
            text = ENTITY.sub(_character, AMPERSANDS.sub("&", text))
        if "<" in text:
            text = INLINE_TAG.sub("", BREAKING_TAG.sub(" ", text))
        if text == before:
            return text
        text = _plain(text)
    return plain


def _character(entity: re.Match[str]) -> str:
    if entity[0][1] == "#":
        return html.unescape(entity[0])
    # Not `html.unescape`, which takes the beginning of an unknown name for a known one: "&notice;" is no "¬ice;".
    return html.entities.html5.get(entity[0][1:], entity[0])


def _plain(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text.strip() if "  " not in text else " ".join(text.split())
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if text.isprintable():  # true of none of the characters that go
        return text
    text = "".join(c for c in text if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn"))
    # Once more: what went may have stood between spaces, or between a letter and its accent.
    return " ".join(unicodedata.normalize("NFC", IDLE_JOINER.sub("", text)).split())


def is_boilerplate(text: str) -> bool:
    """Whether a clean caption says nothing of its image: a file's name, "IMG_1234", "image of"."""
    spaces = text.count(" ")
    if spaces > MOST_SPACES or len(text) > MAX_NAME:
        return False
    name, dot, extension = text.rpartition(".")
    if dot and name and spaces <= MOST_SPACES_OF_NAME and extension.lower() in EXTENSIONS:
        return "/" not in name and not name.endswith(" ")
    return BOILERPLATE.fullmatch(text) is not None
