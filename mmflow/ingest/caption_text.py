"""A caption's text as people meant it: entities and markup undone, one Unicode form, nothing invisible."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

# Zero-width joiners spell words in Persian and the Indic scripts and join emoji; between ASCII they only hide things.
IDLE_JOINER = re.compile("(?<![^\\s\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\\s\x00-\x7f])")
JOINERS = "\u200c\u200d"
# Of entities only those that end as they should: "AT&T" and "Q&A; more" are text.
ESCAPED_AMPERSAND = re.compile(r"&(?:amp;)+", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Markup of running text; what else stands in angle brackets is more often an arrow or a placeholder.
TAG = re.compile(r"</?(?:a|b|br|div|em|font|i|li|p|span|strong|sub|sup|u|ul)(?:\s[^<>]{0,500})?/?>", re.IGNORECASE)

EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
# International with a plus; (020) 7946 0958; 555-867-5309 or with dots; 0211 1234567. Never bare digits, dates, sizes,
# prices or ISBNs: a number lost to a mask is lost to the model.
PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+[0-9]{1,3}(?:[ .()/-]{0,2}[0-9]){7,12}"
    r"|\([0-9]{2,5}\)[ -]?[0-9]{3,4}[ -]?[0-9]{3,5}"
    r"|[0-9]{3}([-.])[0-9]{3}\1[0-9]{4}"
    r"|0[0-9]{2,4}[ /-][0-9]{3,4}[ -]?[0-9]{3,4}"
    r")(?![\w-]|\.[0-9])"
)
PATTERNS = {"email": (EMAIL, "[email]"), "phone": (PHONE, "[phone]")}

# The whole caption is a file's name, a camera's number, or a word for pictures at large.
BOILERPLATE = re.compile(
    r"[^\s/]{1,120}\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic|eps|psd)"
    r"|(?:img|dscn?|dscf|pict?|mvi|sam|gopr|image|photo|picture|screenshot|scan|untitled)[_ -]*[0-9()]{1,20}"
    r"|(?:an? |the )?(?:image|photo|photograph|picture|pic|thumbnail)(?: of(?: an?| the)?)?"
    r"|untitled|no (?:title|caption|description|alt(?: text)?)|alt(?: text)?|placeholder|n/a|null|none|undefined",
    re.IGNORECASE,
)


def clean_text(text: str) -> str:
    """Entities and markup undone, NFC, white space folded; control, format and unpaired surrogate characters out."""
    if "&" in text or "<" in text:
        text = _unescape(text)
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = " ".join(unicodedata.normalize("NFC", text).split())
    text = "".join(c for c in text if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn"))
    # Once more: what went may have stood between spaces, or between a letter and its accent, or within an entity.
    cleaned = " ".join(unicodedata.normalize("NFC", IDLE_JOINER.sub("", text)).split())
    undone = _unescape(cleaned) if "&" in cleaned or "<" in cleaned else cleaned
    return cleaned if undone == cleaned else clean_text(undone)


def _unescape(text: str) -> str:
    """Entities, however often they were escaped, and tags. Every round makes the text shorter, so it ends."""
    while True:
        undone = ENTITY.sub(lambda match: html.unescape(match[0]), ESCAPED_AMPERSAND.sub("&", text))
        undone = TAG.sub(" ", undone)
        if undone == text:
            return text
        text = undone


def mask(text: str, what: Sequence[str]) -> str:
    """The text with e-mail addresses or phone numbers, "email" and "phone", replaced by [email] and [phone]."""
    for name in what:
        pattern, word = PATTERNS[name]
        text = pattern.sub(word, text)
    return text


def is_boilerplate(text: str) -> bool:
    """Whether a clean caption says nothing of its image: a file name, "IMG_1234", "image of"."""
    return len(text) <= 130 and BOILERPLATE.fullmatch(text.rstrip(" .:…")) is not None
