"""Captions: cleaning, masking, languages, bounds, and the reason for each rejection."""

import unicodedata
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.cleaning.captions import (
    MASKS,
    Caption,
    caption_hash,
    clean_captions,
    clean_text,
    detect_language,
    estimate_tokens,
    is_boilerplate,
    mask,
    mask_emails,
    mask_phones,
    same_language,
)
from mmflow.cleaning.config import CaptionConfig
from mmflow.sources.reasons import Reason, Rejected


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
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("caf&amp;amp;amp;eacute; &amp;#233;", "café é"),
        ("AT&T, Q&A; R&D", "AT&T, Q&A; R&D"),
        ("1 &lt; 2", "1 < 2"),
        ("a <b>red</b><br/>fox &lt;i&gt;here&lt;/i&gt;", "a red fox here"),
        ("if x<y and y>z", "if x<y and y>z"),
        ("bell&#7; &#xd800; nul&#0;", "bell \ufffd nul\ufffd"),
        ("&#8211; &#x1F98A;&nbsp;&#8203;fox &am\u200bp;", "– \U0001f98a fox &"),
        ("?a=1&copy=2 &notice; &foo; & &;", "?a=1&copy=2 &notice; &foo; & &;"),
        ("H<sub>2</sub>O <a href=\"http://x/?a=b\" target='_blank'>here</a><P>there</P>", "H2O here there"),
        ("I <3 you, a < b > c, x <b and c> y, <unknown>", "I <3 you, a < b > c, x <b and c> y, <unknown>"),
    ],
)
def test_clean_text(dirty: str, clean: str) -> None:
    assert clean_text(dirty) == clean


DIRT = [
    "&", "amp;", "lt;", "gt;", "#38;", "#x200b;", "<", ">", "b", "br", "/", "=", "\u200b", "\u200d", "é", "\u0301", " ",
]  # fmt: skip
DIRT += ["@", "a", ".de", "0", "123", "+", "-", "(", ")", "ش", "\u00a0", "\ud800"]
TEXTS = st.one_of(st.text(st.characters(codec=None)), st.lists(st.sampled_from(DIRT), max_size=30).map("".join))


@given(TEXTS)
def test_clean_text_is_stable_printable_and_encodable(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not {unicodedata.category(c) for c in cleaned if c not in "\u200c\u200d"} & {"Cc", "Cf", "Cs"}
    assert cleaned == " ".join(cleaned.split())
    cleaned.encode()


def test_nested_escapes_past_the_limit_are_kept_and_cost_no_time() -> None:
    assert clean_text("&&&#35;108;t;") == "<"
    text = "&" * 50_000 + "#35;" + "35;" * 49_998 + "108;t;"  # each round would unescape one of them
    assert clean_text(text) == text


def test_captions_out_of_bounds_and_repeated_captions_are_dropped() -> None:
    captions = [caption("x"), caption("a  fox"), caption("a fox"), caption("a fox", "de"), caption("y" * 50)]
    kept = clean_captions(captions, CaptionConfig(max_characters=20))
    assert kept == [caption("a fox"), caption("a fox", "de")]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], Reason.caption_missing),
        (["", " \u200b "], Reason.caption_missing),
        ([" " * 1_000_000], Reason.caption_missing),
        (["y" * 200, "x"], Reason.caption_too_long),
        (["", "x"], Reason.caption_too_short),
        (["y" * 1_000_000], Reason.caption_too_long),
        (["&amp;" * 200_000], Reason.caption_too_long),
        (["IMG_1234.jpg"], Reason.caption_boilerplate),
        (["", "image of", "x"], Reason.caption_boilerplate),
    ],
)
def test_a_record_without_a_usable_caption_is_rejected_with_the_reason(texts: list[str], reason: Reason) -> None:
    with pytest.raises(Rejected) as rejected:
        clean_captions([caption(text) for text in texts], CaptionConfig(max_characters=100))
    assert rejected.value.reason is reason


@pytest.mark.parametrize("texts", [[], [" \u200b "], ["IMG_1234.jpg", "x"]])
def test_records_without_captions_are_kept_when_captions_are_optional(texts: list[str]) -> None:
    settings = CaptionConfig(required=False)
    assert clean_captions([caption(text) for text in texts], settings) == []
    assert clean_captions([caption(text) for text in [*texts, "a fox"]], settings) == [caption("a fox")]


def test_token_estimates_are_close_to_tokenizer_counts() -> None:
    assert estimate_tokens("坐电动轮椅的女人 中等肤色") in range(11, 15)
    assert estimate_tokens("a woman in a motorized wheelchair, medium skin tone") in range(9, 15)


@pytest.mark.parametrize(
    "text",
    [
        "IMG_1234.JPG", "dsc00012", "DSCN0300", "photo 17", "Image (3)", "untitled", "an image of", "Picture.",
        "8f14e45fceea167a5a36dedd4bea2543.png", "N/A", "no caption", "Screenshot 20240102", "thumbnail", "a photo",
        "IMG 20200101 120000", "P1010001", "my cat (1).png", "Figure 3.", "untitled-1", "picture of a", "图片",
        "Screenshot 2020-01-01 at 10.10.10", "WhatsApp Image 2020-01-01 at 12.00.00 PM", "Sans titre",
        "d41d8cd98f00b204e9800998ecf8427e", "123e4567-e89b-12d3-a456-426614174000",
    ],
)  # fmt: skip
def test_file_names_and_generic_words_are_boilerplate(text: str) -> None:
    assert is_boilerplate(text)


@pytest.mark.parametrize(
    "text",
    [
        "image of a fox", "photo album", "framed picture", "camera", "map", "none of us", "a fox.png in the snow",
        "1984", "how to save an article as a file.png", "P51 Mustang", "Windows 95", "figure skating",
        "foto di un gatto", "deadbeef",
    ],
)  # fmt: skip
def test_captions_with_content_are_not_boilerplate(text: str) -> None:
    assert not is_boilerplate(text)


def test_masks_are_selected_by_name() -> None:
    captions = [caption("joe&#64;example.com, +1\u200b 415 555 2671")]
    for masks, text in (
        ((), "joe@example.com, +1 415 555 2671"),
        (("email",), "[email], +1 415 555 2671"),
        (("phone",), "joe@example.com, [phone]"),
    ):
        assert clean_captions(captions, CaptionConfig(mask=masks)) == [caption(text)]
    assert set(MASKS) == set(get_args(get_args(CaptionConfig.model_fields["mask"].annotation)[0]))


@given(TEXTS, st.sampled_from([["email"], ["phone", "email"]]))
def test_cleaning_twice_changes_nothing(text: str, mask: list[str]) -> None:
    settings = CaptionConfig(min_characters=1, mask=mask, drop_boilerplate=False)
    try:
        cleaned = clean_captions([caption(text)], settings)
    except Rejected:
        return
    assert clean_captions(cleaned, settings) == cleaned


def test_an_overlong_caption_is_rejected_before_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmflow.cleaning.captions.clean_text", None)
    with pytest.raises(Rejected):
        clean_captions([caption("é<b>" * 300_000)], CaptionConfig())


def test_captions_outside_the_token_bounds_are_dropped() -> None:
    settings = CaptionConfig(min_tokens=3, max_tokens=6)
    kept = clean_captions([caption("fox"), caption("a red fox runs"), caption("word " * 20)], settings)
    assert kept == [caption("a red fox runs")]
    with pytest.raises(Rejected, match="at most 6"):
        clean_captions([caption("word " * 20)], settings)


def test_unknown_languages_are_detected_and_filtered_by_primary_subtag() -> None:
    german = "Ein roter Drache fliegt im Herbst über die Dünen an der Nordsee"
    french = "Un cerf-volant rouge vole au-dessus des dunes de la mer du Nord"
    settings = CaptionConfig(detect_language=True, languages=["fr", "en-GB"])
    captions = [caption(german, "und"), caption(french, "und"), caption("a red kite", "en-US")]
    assert clean_captions(captions, settings) == [caption(french, "fr"), caption("a red kite", "en-US")]
    with pytest.raises(Rejected) as rejected:
        clean_captions([caption(german, "und")], settings)
    assert rejected.value.reason is Reason.caption_language
    assert "fr, en-GB" in rejected.value.detail
    assert detect_language("zzz") == detect_language("12345") == "und"
    assert clean_captions([caption("zzz", "und")], CaptionConfig(languages=["fr", "und"])) == [caption("zzz", "und")]
    assert same_language("zh-Hant", "zh")
    assert not same_language("fry", "fr")


def test_captions_that_differ_only_in_case_have_the_same_hash() -> None:
    assert caption_hash("A Red STRASSE") == caption_hash("a red straße")
    assert caption_hash("a red fox") != caption_hash("a red box")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to joe.blow+x@mail.example.co.uk.", "write to [email]."),
        ("(müller@example.de)", "([email])"),
        ("联系joe@example.com谢谢", "联系[email]谢谢"),
        ("mailto:a@b.cc, c@d.ee", "mailto:[email], [email]"),
        ("@handle at example.com, 5 @ 3.50 and a@b", "@handle at example.com, 5 @ 3.50 and a@b"),
    ],
)
def test_email_addresses_are_masked(text: str, masked: str) -> None:
    assert mask_emails(text) == masked


@pytest.mark.parametrize(
    "number",
    [
        "+1 (415) 555-2671", "+14155552671", "+44 20 7946 0958", "+49 (0)30 12345678", "+33.1.23.45.67.89",
        "+86 138 0013 8000", "(+39) 06 1234 5678", "(415) 555-2671", "415-555-2671", "415.555.2671", "1-800-555-0199",
        "020 7946 0958", "(020) 7946 0958", "07700 900123", "01 23 45 67 89", "030/12345678", "030/1234 5678",
        "089-12345678",
    ],
)  # fmt: skip
def test_phone_numbers_are_masked(number: str) -> None:
    assert mask_phones(number) == "[phone]"
    assert mask_phones(f"the shop ({number}), open. {number}.") == "the shop ([phone]), open. [phone]."


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Tel.: 555 2671", "Tel.: [phone]"),
        ("phone no. 555 2671", "phone no. [phone]"),
        ("call 13800138000 now", "call [phone] now"),
        ("2 rooms, 415-555-2671 2 beds", "2 rooms, [phone] 2 beds"),
        ("in 2024 020 7946 0958 rang", "in 2024 [phone] rang"),
        ("+1 415 555 2671 / +1 415 555 2672", "[phone] / [phone]"),
        ("555-867-53091", "555-867-53091"),
    ],
)
def test_phone_numbers_among_other_numbers(text: str, masked: str) -> None:
    assert mask_phones(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "12.05.2024, 2024-05-12, 05/12/2024 10:30, 01.02.2024 10.30, 2024 05 12 100",
        "from 1914-1918 to 1939-1945, 1999 2000 2001 2002",
        "$415.555.2671, $ 1 234 567, 1.234.567,89 €, 1,234,567.89 USD, 0.0012345678",
        "ISBN 978-0-306-40615-7, ISBN-10: 0-306-40615-2, 978 0 306 40615 7, 9780306406157",
        "EAN 4006381333931, ISBN 020 7946 0958",
        "1920x1080, 1920 x 1080 x 24, 3840×2160, 640 480 1024 768",
        "48.856613, 2.352222 and +40.712776 -74.005974",
        "1600 1200, 192.168.1.1, 192.168.100.100, v1.20.300.4000, 4111 1111 1111 1111",
        "100 200 3000 pieces, 13800138000 stars, 25 000 000 people, #415-555-2671",
        "no. 12345678, order 0123 456 789",
    ],
)
def test_dates_prices_isbns_years_and_resolutions_are_not_masked(text: str) -> None:
    assert mask_phones(text) == text


def test_several_masks_apply_together() -> None:
    text = "jane.doe@example.com, 555-867-5309"
    assert mask(text, ["email", "phone"]) == "[email], [phone]"
    assert mask(text, []) == text
