"""Which captions a record keeps: cleaned, masked, within bounds, in the languages asked for, and saying something."""

from __future__ import annotations

import html
import html.entities
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypedDict

import xxhash

from mmflow.cleaning.config import CaptionConfig
from mmflow.sources.reasons import Reason, Rejected

MAX_ROUNDS = 3  # of undoing escapes, and of masking
MAX_MARKUP = 16  # characters of markup and entities per character that is kept

# Scripts written without spaces, where a character is about a token: kana, CJK, Hangul, Thai, Lao, Khmer, Myanmar.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
)
CHARACTERS_PER_TOKEN = 4.4  # BERT's word pieces on English captions, including white space

# Zero-width joiners are part of words in Persian and the Indic scripts, and join emoji; between ASCII they only hide
# things.
IDLE_JOINER = re.compile("(?<![^\\s\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\\s\x00-\x7f])")
JOINERS = "\u200c\u200d"
# Only with the semicolon: "R&D", "?a=1&copy=2" and "AT&T" are no entities.
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# An ampersand that was escaped repeatedly, as in scraped captions.
AMPERSANDS = re.compile(r"&(?:(?:amp|AMP|#0{0,5}38|#[xX]0{0,4}26);)+")
# Only the markup of running text: "a < b", "<3" and "<unknown>" are content. An attribute needs its "=", so that
# "x <b and c> y" stays. Breaking tags separate words; inline tags may stand within a word: H<sub>2</sub>O.
ATTRIBUTES = r"""(?:\s+[a-zA-Z-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>=]+))*"""
BREAKING = "br|p|div|li|ul|ol|hr|tr|td|th|table|h[1-6]|blockquote|figure|figcaption|img"
INLINE = "b|i|u|em|strong|span|a|font|small|big|sub|sup|center|cite|abbr|mark|q|s|code"
BREAKING_TAG = re.compile(rf"</?(?:{BREAKING}){ATTRIBUTES}\s*/?>", re.IGNORECASE)
INLINE_TAG = re.compile(rf"</?(?:{INLINE}){ATTRIBUTES}\s*/?>", re.IGNORECASE)

# Words that only say that there is a picture.
EMPTY_WORDS = (
    "images?|photos?|photograph|pictures?|pic|img|fig(?:ure)?|thumbnail|placeholder|untitled|unnamed"
    "|no (?:title|caption|description|name|alt(?: text)?)(?: available)?|alt(?: text)?|null|none|undefined|n/a"
    "|图片|照片|画像|写真|无标题|無題|bild|foto|imagen|imagem|immagine|фото|изображение"
    "|ohne titel|sans titre|sin título|senza titolo|sem título|без названия"
)
BOILERPLATE = re.compile(
    rf"(?:an? |the )?(?:{EMPTY_WORDS})(?: of(?: an?| the)?)?[\s_#(-]*\d*\)?[\s.:!…-]*"
    # File names from cameras, phones and screenshots.
    r"|(?:img|dsc[nf]?|pict?|mvi|gopr|dji|pxl|sam|cimg|hpim|imgp|vid|scan|image|photo)[\s_-]?\d[\d_\s-]*(?:\(\d+\))?"
    r"|p\d{7}|(?:screenshot|screen shot|whatsapp image)[\s_-][\d\s_.:-]*(?:at [\d.:]+)?(?: [ap]m)?"
    # Hashes and UUIDs.
    r"|[0-9a-f]{16,128}|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}",
    re.IGNORECASE,
)
MOST_SPACES, MAX_BOILERPLATE = 5, 130  # a longer caption is not examined
IMAGES = ["jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "svg", "avif", "heic", "eps", "psd", "ico", "nef"]
EXTENSIONS = frozenset([*IMAGES, "cr2", "mp4", "mov"])
MOST_SPACES_OF_NAME = 3  # a sentence may end in a file name too

EMAIL = re.compile(r"[A-Za-z0-9À-ɏ._%+'-]{1,64}@(?:[A-Za-z0-9À-ɏ-]{1,63}\.){1,8}[A-Za-z]{2,24}")
# Digits with single separators, or with a bracket and a space; `is_phone` decides which parts are phone numbers.
# Neither end may continue as a number, a word or a price would.
CANDIDATE = re.compile(
    r"(?<![\w.,/+$€£¥#-])(?<![$€£¥#] )"
    r"(?:\+ ?\d|\((?=\+?\d{1,5}\))\+?\d|\d)(?:(?:[ ./-]|\)[ -]?| ?\(|)\d){6,16}"
    r"(?![\w%€£¥$]|[.,/-]\d| [€£¥$%])"
)
# Labels before a number that say that it is a phone number, or that it is another kind of number.
PHONE_LABEL = re.compile(
    r"(?i)\b(?:tel|telephone|phone|ph|mobile|mob|cell|fax|call|whatsapp|telefon|tél|tlf)[.: ]*"
    r"(?:(?:no|nr|number)[.: ]*)?$"
)
OTHER_LABEL = re.compile(r"(?i)\b(?:isbn(?:[- ]?1[03])?|issn|ean|upc|doi|sku|no\.|nr\.|id|serial|order)[.:# ]*$")
LABEL_CHARACTERS = 24
NORTH_AMERICAN = re.compile(r"(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}|[2-9]\d\d([.-])[2-9]\d\d\1\d{4})")
DATE = re.compile(r"(?:19|20)\d\d([ ./-])\d{1,2}\1\d{1,2}(?!\d)|(?<!\d)\d{1,2}([ ./-])\d{1,2}\2(?:19|20)\d\d(?!\d)")

UNKNOWN_LANGUAGE = "und"  # BCP 47
NO_LANGUAGE = "zxx"  # numbers and the like
# Measured on 600 emoji names of two or three words per language: from this probability on, 98% are right in English
# (30% of the names reach it), 100% in French (70%) and 87% in Chinese (32%); below it 58, 51 and 81%.
LEAST_PROBABILITY = 0.5
MAX_CHARACTERS = 1_000  # a paragraph is enough to tell a language


class Caption(TypedDict):
    """A caption and its language tag (BCP 47; "und" if unknown)."""

    language: str
    text: str


def clean_captions(captions: Sequence[Caption], settings: CaptionConfig) -> list[Caption]:
    """The captions cleaned, in order, without repeats; those out of bounds are dropped.

    Raises Rejected if one is required and none is left, with the reason why the first one that had text was dropped.
    """
    kept: dict[tuple[str, str], Caption] = {}
    rejection: Rejected | None = None
    for caption in captions:
        try:
            cleaned = clean_caption(caption, settings)
        except Rejected as rejected:
            if rejection is None and rejected.reason is not Reason.caption_missing:
                rejection = rejected
        else:
            kept.setdefault((cleaned["language"], cleaned["text"]), cleaned)
    if not kept and settings.required:
        raise rejection or Rejected(Reason.caption_missing, f"{len(captions)} captions, none with text")
    return list(kept.values())


def clean_caption(caption: Caption, settings: CaptionConfig) -> Caption:
    """One caption, cleaned, masked and tagged. Raises Rejected."""
    raw, language = caption["text"].strip(), caption["language"]
    if len(raw) > MAX_MARKUP * settings.max_characters:  # too long even if most of it is markup: skip the cleaning
        _check_length(len(raw), "characters", 0, settings.max_characters)
    text = clean_text(raw)
    if not text:
        raise Rejected(Reason.caption_missing, "no text")
    if settings.drop_boilerplate and is_boilerplate(text):
        raise Rejected(Reason.caption_boilerplate, f"{text[:80]!r} says nothing about an image")
    if settings.mask and len(text) <= settings.max_characters:
        text = _mask_until_stable(text, settings.mask)
    _check_length(len(text), "characters", settings.min_characters, settings.max_characters)
    if settings.min_tokens or settings.max_tokens is not None:
        _check_length(estimate_tokens(text), "tokens", settings.min_tokens, settings.max_tokens)
    if settings.detect_language and language == UNKNOWN_LANGUAGE:
        language = detect_language(text)
    if settings.languages and not any(same_language(language, wanted) for wanted in settings.languages):
        raise Rejected(Reason.caption_language, f"{language} is not one of {', '.join(settings.languages)}")
    return Caption(language=language, text=text)


def _check_length(length: int, unit: str, least: int, most: int | None) -> None:
    if length < least:
        raise Rejected(Reason.caption_too_short, f"{length} {unit}, at least {least} are needed")
    if most is not None and length > most:
        raise Rejected(Reason.caption_too_long, f"{length} {unit}, at most {most} are allowed")


def estimate_tokens(text: str) -> int:
    """The approximate number of tokens, without a tokenizer: good enough for sorting and bounds."""
    unspaced = 0 if text.isascii() else len(UNSPACED.findall(text))
    return unspaced + round((len(text) - unspaced) / CHARACTERS_PER_TOKEN + 0.5)


def caption_hash(text: str) -> int:
    """xxh3_64 of the case-folded text: equal for captions that differ only in case."""
    return xxhash.xxh3_64_intdigest(text.casefold().encode())


# --- text -------------------------------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """NFC, single spaces, no control, format or unpaired surrogate characters, entities and markup undone.

    Escapes and markup may hide each other, or what `_plain` removes, so they are undone until none are left. A text
    that still changes after `MAX_ROUNDS` was made up, not escaped: it stays as it was.
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
    # Not `html.unescape`, which accepts the beginning of an unknown name: it would turn "&notice;" into "¬ice;".
    return html.entities.html5.get(entity[0][1:], entity[0])


def _plain(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text.strip() if "  " not in text else " ".join(text.split())
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if text.isprintable():  # then it has none of the characters to remove
        return text
    text = "".join(c for c in text if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn"))
    # Again: a removed character may have stood between spaces, or between a letter and its accent.
    return " ".join(unicodedata.normalize("NFC", IDLE_JOINER.sub("", text)).split())


def is_boilerplate(text: str) -> bool:
    """Whether a clean caption says nothing about its image: a file name, "IMG_1234", "image of"."""
    spaces = text.count(" ")
    if spaces > MOST_SPACES or len(text) > MAX_BOILERPLATE:
        return False
    name, dot, extension = text.rpartition(".")
    if dot and name and spaces <= MOST_SPACES_OF_NAME and extension.lower() in EXTENSIONS:
        return "/" not in name and not name.endswith(" ")
    return BOILERPLATE.fullmatch(text) is not None


# --- masks ------------------------------------------------------------------------------------------------------------


def _mask_until_stable(text: str, kinds: Sequence[str]) -> str:
    """Masked and clean: masking may free a joiner to be removed, or leave another phone number beside the mask."""
    for _ in range(MAX_ROUNDS):
        masked = clean_text(mask(text, kinds))
        if masked == text:
            break
        text = masked
    return text


def mask(text: str, kinds: Sequence[str]) -> str:
    """The text with e-mail addresses ("email") or phone numbers ("phone") replaced by [email] and [phone]."""
    for kind in kinds:
        text = MASKS[kind](text)
    return text


def mask_emails(text: str) -> str:
    """The text with [email] instead of each address."""
    return EMAIL.sub("[email]", text) if "@" in text else text


def mask_phones(text: str) -> str:
    """The text with [phone] instead of each phone number.

    Phone numbers are: + and a country code, an area code that begins with 0 and separated groups, North America's
    3-3-4, and any number after a word such as "Tel.". All other numbers stay: dates, prices, ISBNs, years, resolutions.
    """

    def replace(match: re.Match[str]) -> str:
        return _mask_candidate(match[0], text[max(0, match.start() - LABEL_CHARACTERS) : match.start()])

    return CANDIDATE.sub(replace, text)


def _mask_candidate(candidate: str, before: str) -> str:
    """The candidate with its phone numbers masked, the first and longest first: other numbers may stand beside them."""
    announced = PHONE_LABEL.search(before) is not None
    if not announced and OTHER_LABEL.search(before):
        return candidate
    starts = [0, *(space.end() for space in re.finditer(" ", candidate))]
    ends = [len(candidate), *(start - 1 for start in reversed(starts[1:]))]
    for start in starts:
        for end in ends:
            if end > start and is_phone(candidate[start:end], announced=announced and not start):
                return f"{candidate[:start]}[phone]{mask_phones(candidate[end:])}"
    return candidate


def is_phone(number: str, *, announced: bool = False) -> bool:
    """Whether a number has the form of a phone number. After a label that announces one, many forms qualify."""
    groups = re.findall(r"\d+", number)
    digits = sum(map(len, groups))
    if DATE.search(number):
        return False
    if announced:
        return 7 <= digits <= 15
    if number.lstrip("(").startswith("+"):
        # Decimals such as coordinates have many digits after the point.
        return 8 <= digits <= 15 and not re.search(r"\.\d{5}", number)
    if NORTH_AMERICAN.fullmatch(number):
        return True
    # An area code, separated by a slash or a bracket, or by the same separator as the other groups.
    code = re.match(r"\(?0[1-9]\d{0,4}(?:\) ?|[ ./-])", number)
    return (
        code is not None
        and 9 <= digits <= 11
        and min(map(len, groups)) >= 2
        and len({character for character in number if character in " ./-"} - ({"/"} if "/" in code[0] else set())) <= 1
    )


MASKS = {"email": mask_emails, "phone": mask_phones}


# --- languages --------------------------------------------------------------------------------------------------------


def detect_language(text: str) -> str:
    """The text's language (ISO 639-1) by py3langid, or "und" if the model is not sure."""
    language, probability = _identifier().classify(text[:MAX_CHARACTERS])
    return str(language) if probability >= LEAST_PROBABILITY and language != NO_LANGUAGE else UNKNOWN_LANGUAGE


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # the model is part of the package: no network needed

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def same_language(tag: str, wanted: str) -> bool:
    """Whether two BCP 47 tags share their primary subtag: "pt-BR" and "pt"."""
    return tag.partition("-")[0].lower() == wanted.partition("-")[0].lower()
