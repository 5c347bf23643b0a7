"""Captions as people meant them: one Unicode form, nothing invisible, within bounds."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TypedDict

import xxhash

from mmflow.ingest.config import CaptionConfig
from mmflow.ingest.reasons import Reason, Rejected


class Caption(TypedDict):
    """A caption and its language tag (BCP 47; "und" where nobody said)."""

    language: str
    text: str


# Zero-width joiners spell words in Persian and the Indic scripts and join emoji; between ASCII they only hide things.
IDLE_JOINER = re.compile("(?<![^\\s\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\\s\x00-\x7f])")
JOINERS = "\u200c\u200d"
# Scripts written without spaces, in which a character is about a token: kana, CJK, Hangul, Thai, Lao, Khmer, Myanmar.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
)
CHARACTERS_PER_TOKEN = 4.4  # BERT's word pieces on English captions, white space counted


def clean_captions(captions: Sequence[Caption], settings: CaptionConfig) -> list[Caption]:
    """The captions cleaned, in order, without repeats; those out of bounds are dropped.

    Raises Rejected where none is left, with the fate of the first that had any text.
    """
    min_characters, max_characters = settings.min_characters, settings.max_characters
    kept: list[Caption] = []
    fate = Rejected(Reason.caption_missing, f"{len(captions)} captions, none with text")
    for caption in captions:
        text = clean_text(caption["text"])
        if not text:
            continue
        if len(text) < min_characters:
            verdict = Rejected(Reason.caption_too_short, f"{len(text)} characters, at least {min_characters} are asked")
        elif len(text) > max_characters:
            verdict = Rejected(Reason.caption_too_long, f"{len(text)} characters, at most {max_characters} are asked")
        else:
            cleaned = Caption(language=caption["language"], text=text)
            if cleaned not in kept:
                kept.append(cleaned)
            continue
        if fate.reason is Reason.caption_missing:
            fate = verdict
    if not kept:
        raise fate
    return kept


def clean_text(text: str) -> str:
    """NFC, white space folded to single spaces, control, format and unpaired surrogate characters out."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = " ".join(unicodedata.normalize("NFC", text).split())
    text = "".join(c for c in text if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn"))
    # Once more: what went may have stood between spaces, or between a letter and its accent.
    return " ".join(unicodedata.normalize("NFC", IDLE_JOINER.sub("", text)).split())


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer: enough to sort and bound by."""
    unspaced = len(UNSPACED.findall(text))
    return unspaced + round((len(text) - unspaced) / CHARACTERS_PER_TOKEN + 0.5)


def caption_hash(text: str) -> int:
    """xxh3_64 of the case-folded text: the same for captions that differ in case alone."""
    return xxhash.xxh3_64_intdigest(text.casefold().encode())
