"""Masks: addresses and phone numbers go, and the numbers that only look like them stay."""

import pytest

from mmflow.cleaning.captions import mask, mask_emails, mask_phones


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to joe.blow+x@mail.example.co.uk.", "write to [email]."),
        ("(müller@example.de)", "([email])"),
        ("联系joe@example.com谢谢", "联系[email]谢谢"),
        ("mailto:a@b.cc, c@d.ee", "mailto:[email], [email]"),
        ("@handle at 5 @ 3.50 and a@b", "@handle at 5 @ 3.50 and a@b"),
    ],
)
def test_emails(text: str, masked: str) -> None:
    assert mask_emails(text) == masked


@pytest.mark.parametrize(
    "number",
    [
        "+1 (415) 555-2671",
        "+14155552671",
        "+44 20 7946 0958",
        "+49 (0)30 12345678",
        "+33.1.23.45.67.89",
        "+86 138 0013 8000",
        "(+39) 06 1234 5678",
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
        "1-800-555-0199",
        "020 7946 0958",
        "(020) 7946 0958",
        "07700 900123",
        "01 23 45 67 89",
        "030/12345678",
        "030/1234 5678",
        "089-12345678",
    ],
)
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
def test_dates_prices_isbns_years_and_resolutions_stay(text: str) -> None:
    assert mask_phones(text) == text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+cats@mail.example.co.uk today", "write to [email] today"),
        ("@nobody at example.com", "@nobody at example.com"),
        ("call +49 211 1234567 or (020) 7946 0958", "call [phone] or [phone]"),
        ("call 555-867-5309, 555.867.5309 or 0211 1234567", "call [phone], [phone] or [phone]"),
        ("555-867-53091", "555-867-53091"),
    ],
)
def test_both_at_once(text: str, masked: str) -> None:
    assert mask(text, ["email", "phone"]) == masked
    assert mask(text, []) == text
