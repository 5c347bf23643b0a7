"""Typos and shuffled words: what changes, what stays, in many scripts, and None where nothing can change."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.inference.perturbations import WORD, shuffled_words, typos

CAPTION = "Two red kites, flying over the harbour's grey houses."


def words(caption: str | None) -> list[str]:
    assert caption is not None
    return WORD.findall(caption)


@pytest.mark.parametrize("change", [typos, shuffled_words])
@given(caption=st.text(alphabet=st.sampled_from("aàB éक्षि的 ,.-'9ß"), max_size=30) | st.text(max_size=30))
def test_a_change_is_always_the_same_and_never_the_caption(change: Callable[[str], str | None], caption: str) -> None:
    changed = change(caption)
    assert changed == change(caption)
    assert changed is None or changed.casefold() != caption.casefold()
    if changed is not None:
        changed.encode()
        assert len(words(changed)) == len(words(caption))


def test_typos_are_in_a_quarter_of_the_long_words() -> None:
    captions = [f"{CAPTION} Number {number}" for number in range(200)]
    for caption in captions:
        pairs = list(zip(words(caption), words(typos(caption)), strict=True))
        misspelt = [(word, typo) for word, typo in pairs if word != typo]
        assert len(misspelt) == 2  # of kites, flying, over, grey, houses, Number; harbour's is more than letters
        for word, typo in misspelt:
            assert (word[0], word[-1]) == (typo[0], typo[-1])
            assert abs(len(word) - len(typo)) <= 1
            assert set(typo) <= set(word)


def test_every_mistake_is_made() -> None:
    made = Counter(len(words(typos(f"kites {number}"))[0]) - len("kites") for number in range(300))
    assert set(made) == {-1, 0, 1}
    assert min(made.values()) > 60


@pytest.mark.parametrize(
    "caption", ["", "a red cat", "4x4 don't b2b", "一只红色的猫在窗边", "고양이가 창가에 있다", "…", "🐈🐈🐈🐈"]
)
def test_captions_without_typos(caption: str) -> None:
    assert typos(caption) is None


@pytest.mark.parametrize(
    "word", ["кошка", "γάτες", "बिल्लियाँ", "قطتان", "cafe\u0301s", "o\u0308ffnen", "mo\u0304kuki\u0304"]
)
def test_accents_and_vowel_signs_stay_on_their_letters(word: str) -> None:
    before = clusters(word)
    for number in range(40):
        after = clusters(words(typos(f"{word} {number}"))[0])
        assert set(after) <= set(before)
        assert sum((Counter(before) - Counter(after)).values()) <= 1


def clusters(word: str) -> list[str]:
    found: list[str] = []
    for character in word:
        if unicodedata.category(character).startswith("M"):
            found[-1] += character
        else:
            found.append(character)
    return found


def test_shuffling_keeps_words_and_punctuation_and_the_capital() -> None:
    shuffled = shuffled_words(CAPTION)
    assert shuffled is not None
    assert Counter(word.lower() for word in words(shuffled)) == Counter(word.lower() for word in words(CAPTION))
    assert WORD.sub("", shuffled) == WORD.sub("", CAPTION)
    assert shuffled[0].isupper()
    assert shuffled[1:].islower()


@pytest.mark.parametrize(
    ("caption", "shuffled"),
    [
        ("red kite", "kite red"),
        ("Red kite!", "Kite red!"),
        ("NASA rocket", "Rocket NASA"),
        ("कुत्ता सोता", "सोता कुत्ता"),
        ("kite", None),
        ("kite Kite, KITE", None),
        ("", None),
        ("红色的苹果，绿色的梨", None),
    ],
)
def test_shuffled_words_by_hand(caption: str, shuffled: str | None) -> None:
    assert shuffled_words(caption) == shuffled


def test_orders_are_drawn_evenly() -> None:
    orders = Counter(" ".join(words(shuffled_words(f"a b c{'.' * number}"))) for number in range(500))
    assert len(orders) == 5
    assert min(orders.values()) > 60
