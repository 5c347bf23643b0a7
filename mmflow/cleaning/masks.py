"""E-mail addresses and phone numbers in captions, replaced by what they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

EMAIL = re.compile(r"[A-Za-z0-9À-ɏ._%+'-]{1,64}@(?:[A-Za-z0-9À-ɏ-]{1,63}\.){1,8}[A-Za-z]{2,24}")
# Digits with single separators, or with a bracket and a space; what of them is a phone number, `is_phone` decides.
# Neither side may go on as a number, a word or a price would.
CANDIDATE = re.compile(
    r"(?<![\w.,/+$€£¥#-])(?<![$€£¥#] )"
    r"(?:\+ ?\d|\((?=\+?\d{1,5}\))\+?\d|\d)(?:(?:[ ./-]|\)[ -]?| ?\(|)\d){6,16}"
    r"(?![\w%€£¥$]|[.,/-]\d| [€£¥$%])"
)
# A label that says that it is one, or that it is none.
CALLED = re.compile(
    r"(?i)\b(?:tel|telephone|phone|ph|mobile|mob|cell|fax|call|whatsapp|telefon|tél|tlf)[.: ]*"
    r"(?:(?:no|nr|number)[.: ]*)?$"
)
NUMBERED = re.compile(r"(?i)\b(?:isbn(?:[- ]?1[03])?|issn|ean|upc|doi|sku|no\.|nr\.|id|serial|order)[.:# ]*$")
LABEL_CHARACTERS = 24
NORTH_AMERICAN = re.compile(r"(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}|[2-9]\d\d([.-])[2-9]\d\d\1\d{4})")
DATE = re.compile(r"(?:19|20)\d\d([ ./-])\d{1,2}\1\d{1,2}(?!\d)|(?<!\d)\d{1,2}([ ./-])\d{1,2}\2(?:19|20)\d\d(?!\d)")


def mask(text: str, what: Sequence[str]) -> str:
    """The text with e-mail addresses or phone numbers, "email" and "phone", replaced by [email] and [phone]."""
    for name in what:
        text = MASKS[name](text)
    return text


def mask_emails(text: str) -> str:
    """The text with [email] in the place of each address."""
    return EMAIL.sub("[email]", text) if "@" in text else text


def mask_phones(text: str) -> str:
    """The text with [phone] in the place of each phone number.

    Taken for one: + and a country's code, an area code that begins with 0 and parted groups, North America's 3-3-4, and
    any number that a word such as "Tel." announces. Everything else stays: dates, prices, ISBNs, years, resolutions.
    """

    def replace(found: re.Match[str]) -> str:
        return _mask_candidate(found[0], text[max(0, found.start() - LABEL_CHARACTERS) : found.start()])

    return CANDIDATE.sub(replace, text)


def _mask_candidate(candidate: str, before: str) -> str:
    """The candidate with its phone numbers masked, the first and longest first: other numbers may stand beside them."""
    announced = CALLED.search(before) is not None
    if not announced and NUMBERED.search(before):
        return candidate
    starts = [0, *(found.end() for found in re.finditer(" ", candidate))]
    ends = [len(candidate), *(start - 1 for start in reversed(starts[1:]))]
    for start in starts:
        for end in ends:
            if end > start and is_phone(candidate[start:end], announced=announced and not start):
                return f"{candidate[:start]}[phone]{mask_phones(candidate[end:])}"
    return candidate


def is_phone(number: str, *, announced: bool = False) -> bool:
    """Whether a number is one to call, by its form; one that is announced as such has many forms."""
    groups = re.findall(r"\d+", number)
    digits = sum(map(len, groups))
    if DATE.search(number):
        return False
    if announced:
        return 7 <= digits <= 15
    if number.lstrip("(").startswith("+"):
        # Of decimals, such as coordinates, the part behind the point is long.
        return 8 <= digits <= 15 and not re.search(r"\.\d{5}", number)
    if NORTH_AMERICAN.fullmatch(number):
        return True
    # An area code, set apart by a slash or a bracket, or by what parts the other groups too.
    code = re.match(r"\(?0[1-9]\d{0,4}(?:\) ?|[ ./-])", number)
    return (
        code is not None
        and 9 <= digits <= 11
        and min(map(len, groups)) >= 2
        and len({character for character in number if character in " ./-"} - ({"/"} if "/" in code[0] else set())) <= 1
    )


MASKS = {"email": mask_emails, "phone": mask_phones}
