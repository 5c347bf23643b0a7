"""Captions: what is cleaned away, what stays, and which verdict a record gets."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.ingest.captions import Caption, clean_captions, clean_text, estimate_tokens
from mmflow.ingest.reasons import Reason, Rejected


def caption(text: str, language: str = "en") -> Caption:
    return Caption(language=language, text=text)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("  a\tred \n\n fox ", "a red fox"),
        ("cafe\u0301", "café"),
        ("in\u200bvis\ufeffible\u00ad", "invisible"),
        ("bell\x07 and \x00null", "bell and null"),
        ("a \u202eright-to-left\u202c override", "a right-to-left override"),
        ("half a pair \ud83d", "half a pair"),
        ("p\u200da\u200dss", "pass"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # Persian: the joiner spells the word
        ("क्\u200dष", "क्\u200dष"),
        ("\U0001f469\u200d\U0001f680 rocket", "\U0001f469\u200d\U0001f680 rocket"),
        ("\u3000全角\u3000空格 ", "全角 空格"),
        ("\u200d \u200c", ""),
    ],
)
def test_clean_text(dirty: str, clean: str) -> None:
    assert clean_text(dirty) == clean


@given(st.text(st.characters(codec=None)))
def test_clean_text_is_stable_printable_and_encodable(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not {unicodedata.category(c) for c in cleaned if c not in "\u200c\u200d"} & {"Cc", "Cf", "Cs"}
    cleaned.encode()


def test_captions_out_of_bounds_are_dropped_and_repeats_folded() -> None:
    captions = [caption("x"), caption("a  fox"), caption("a fox"), caption("a fox", "de"), caption("y" * 50)]
    kept = clean_captions(captions, min_characters=2, max_characters=20)
    assert kept == [caption("a fox"), caption("a fox", "de")]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], Reason.caption_missing),
        (["", " \u200b "], Reason.caption_missing),
        (["", "x"], Reason.caption_too_short),
        (["y" * 1_000_000], Reason.caption_too_long),
    ],
)
def test_a_record_without_a_caption_left_is_rejected_with_the_reason(texts: list[str], reason: Reason) -> None:
    with pytest.raises(Rejected) as rejected:
        clean_captions([caption(text) for text in texts], min_characters=2, max_characters=100)
    assert rejected.value.reason is reason


def test_token_estimates_are_near_what_tokenizers_give() -> None:
    assert estimate_tokens("坐电动轮椅的女人 中等肤色") in range(11, 15)
    assert estimate_tokens("a woman in a motorized wheelchair, medium skin tone") in range(9, 15)
