"""Which captions a record keeps: cleaned, within bounds, in the languages asked for, and saying something."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

import xxhash

from mmflow.cleaning.caption_text import MAX_ROUNDS, clean_text, is_boilerplate
from mmflow.cleaning.config import CaptionConfig
from mmflow.cleaning.languages import UNKNOWN, detect_language, same_language
from mmflow.cleaning.masks import mask
from mmflow.sources.reasons import Reason, Rejected


class Caption(TypedDict):
    """A caption and its language tag (BCP 47; "und" where nobody said)."""

    language: str
    text: str


# Scripts written without spaces, in which a character is about a token: kana, CJK, Hangul, Thai, Lao, Khmer, Myanmar.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
)
MAX_MARKUP = 16  # characters of markup and entities to one that is left
CHARACTERS_PER_TOKEN = 4.4  # BERT's word pieces on English captions, white space counted


def clean_captions(captions: Sequence[Caption], settings: CaptionConfig) -> list[Caption]:
    """The captions cleaned, in order, without repeats; those out of bounds are dropped.

    Raises Rejected where one is required and none is left, with the fate of the first that had any text.
    """
    kept: dict[tuple[str, str], Caption] = {}
    fate: Rejected | None = None
    for caption in captions:
        try:
            cleaned = clean_caption(caption, settings)
        except Rejected as rejected:
            if fate is None and rejected.reason is not Reason.caption_missing:
                fate = rejected
        else:
            kept.setdefault((cleaned["language"], cleaned["text"]), cleaned)
    if not kept and settings.required:
        raise fate or Rejected(Reason.caption_missing, f"{len(captions)} captions, none with text")
    return list(kept.values())


def clean_caption(caption: Caption, settings: CaptionConfig) -> Caption:
    """One caption, cleaned, masked and tagged. Raises Rejected."""
    raw, language = caption["text"].strip(), caption["language"]
    if len(raw) > MAX_MARKUP * settings.max_characters:  # not worth cleaning: even of markup there is too much
        raise _rejected("caption_too_long", len(raw), "characters", "at most", settings.max_characters)
    text = clean_text(raw)
    if not text:
        raise Rejected(Reason.caption_missing, "no text")
    if settings.drop_boilerplate and is_boilerplate(text):
        raise Rejected(Reason.caption_boilerplate, f"{text[:80]!r} says nothing of an image")
    if settings.mask and len(text) <= settings.max_characters:
        text = _mask(text, settings.mask)
    if len(text) < settings.min_characters:
        raise _rejected("caption_too_short", len(text), "characters", "at least", settings.min_characters)
    if len(text) > settings.max_characters:
        raise _rejected("caption_too_long", len(text), "characters", "at most", settings.max_characters)
    if settings.min_tokens or settings.max_tokens is not None:
        tokens = estimate_tokens(text)
        if tokens < settings.min_tokens:
            raise _rejected("caption_too_short", tokens, "tokens", "at least", settings.min_tokens)
        if settings.max_tokens is not None and tokens > settings.max_tokens:
            raise _rejected("caption_too_long", tokens, "tokens", "at most", settings.max_tokens)
    if settings.detect_language and language == UNKNOWN:
        language = detect_language(text)
    if settings.languages and not any(same_language(language, wanted) for wanted in settings.languages):
        raise Rejected(Reason.caption_language, f"{language}, of {', '.join(settings.languages)} one is asked")
    return Caption(language=language, text=text)


def _mask(text: str, what: Sequence[str]) -> str:
    """The text masked and clean: what stood beside a number may be idle beside its mask, or a number to call itself."""
    for _ in range(MAX_ROUNDS):
        masked = clean_text(mask(text, what))
        if masked == text:
            break
        text = masked
    return text


def _rejected(reason: str, found: int, unit: str, bound: str, asked: int) -> Rejected:
    return Rejected(Reason(reason), f"{found} {unit}, {bound} {asked} are asked")


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer: enough to sort and bound by."""
    unspaced = 0 if text.isascii() else len(UNSPACED.findall(text))
    return unspaced + round((len(text) - unspaced) / CHARACTERS_PER_TOKEN + 0.5)


def caption_hash(text: str) -> int:
    """xxh3_64 of the case-folded text: the same for captions that differ in case alone."""
    return xxhash.xxh3_64_intdigest(text.casefold().encode())
