"""Changes of captions in any language: typos, which a model should overlook, and another word order, which it should
notice.

A change depends on the caption alone. It is None where a caption has nothing to change, and never the caption itself,
which would count as a tie.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from mmflow.cleaning.captions import JOINERS, UNSPACED
from mmflow.core.randomness import generator_of

TYPO_SHARE = 0.25  # of the words that are long enough
TYPO_LETTERS = 4  # as in arXiv 1905.11268: shorter words stay, and so do the first and last letters

_MARKS = r""".,:;!?'"()\[\]{}<>…“”„‘’«»¿¡।|/–—-"""
WORD = re.compile(rf"[^\s{_MARKS}](?:\S*[^\s{_MARKS}])?")  # "double-decker" and "don't" are one word


def typos(caption: str) -> str | None:
    """The caption with typing mistakes in a quarter of its words, at least in one: two neighbouring letters exchanged,
    one dropped or one doubled.

    Captions in scripts such as Chinese or Korean are left alone: a mistake there is another character of the same
    sound, for which this would need a dictionary.
    """
    words = WORD.findall(caption)
    letters = [_letters(word) for word in words]
    long = [place for place, own in enumerate(letters) if len(own) >= TYPO_LETTERS]
    if not long or UNSPACED.search(caption):
        return None
    random = generator_of(f"typos {caption}")
    for place in random.choice(long, max(1, round(TYPO_SHARE * len(long))), replace=False):
        words[place] = "".join(_misspelt(letters[place], random))
    return with_words(caption, words)


def shuffled_words(caption: str) -> str | None:
    """The caption with its words in another order, its punctuation in place (ARO, arXiv 2210.01936).

    None for a single word, also a repeated one, and for captions in scripts without spaces, such as Chinese: their
    words are not known here.
    """
    words = without_capital(WORD.findall(caption))
    folded = [word.casefold() for word in words]
    if len(set(folded)) < 2 or UNSPACED.search(caption):
        return None
    random = generator_of(f"shuffled_words {caption}")
    order = random.permutation(len(words))
    while [folded[place] for place in order] == folded:
        order = random.permutation(len(words))
    return with_words(caption, [words[place] for place in order])


# --- words ----------------------------------------------------------------------------------------------------------


def without_capital(words: list[str]) -> list[str]:
    """The words without the capital that begins a sentence, which would show where the first word was."""
    begins = len(words) > 1 and words[0][0].isupper() and words[0][1:] == words[0][1:].lower() and words[1].islower()
    return [words[0].lower(), *words[1:]] if begins else words


def with_words(caption: str, words: Sequence[str]) -> str:
    """The caption with as many other words in the places of its own, beginning with a capital if it did."""
    replacements = iter(words)
    changed = WORD.sub(lambda _: next(replacements), caption)
    first = WORD.search(caption)
    if first is None or not caption[first.start()].isupper():
        return changed
    return changed[: first.start()] + changed[first.start()].upper() + changed[first.start() + 1 :]


def _letters(word: str) -> list[str]:
    """The letters of a word, each with its accents and vowel signs; [] where it has other characters, as "4x4" has."""
    letters: list[str] = []
    for character in word:
        if letters and (unicodedata.category(character).startswith("M") or character in JOINERS):
            letters[-1] += character
        elif character.isalpha():
            letters.append(character)
        else:
            return []
    return letters


def _misspelt(letters: list[str], random: np.random.Generator) -> list[str]:
    inner = range(1, len(letters) - 1)
    exchangeable = [place for place in inner[:-1] if letters[place] != letters[place + 1]]
    mistake = random.choice(["exchange", "drop", "double"] if exchangeable else ["drop", "double"])
    place = int(random.choice(exchangeable if mistake == "exchange" else inner))
    before, letter, after = letters[:place], letters[place], letters[place + 1 :]
    if mistake == "exchange":
        return [*before, after[0], letter, *after[1:]]
    return [*before, *after] if mistake == "drop" else [*before, letter, letter, *after]
