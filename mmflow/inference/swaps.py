"""English captions with two attributes or two objects exchanged, as in ARO's attribution and relation (arXiv
2210.01936) and SugarCrepe's swaps (arXiv 2306.14610).

Those need a tagger. Here words from closed lists decide, and a swap is made only where it surely changes what a caption
says. So most captions have none: a share comes with its number of rows. A model of language alone may still
prefer some true captions ("a couch on a dog" is rare); SugarCrepe filtered such pairs with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise, product
from typing import NamedTuple

from mmflow.inference.perturbations import WORD, with_words, without_capital

# Exchanging two words of a kind keeps a caption plausible. Between commas stand words that mean nearly the same;
# exchanging those would change nothing.
ATTRIBUTES = {
    "colour": "red scarlet crimson, orange, yellow, green, blue, purple violet, pink, brown, black, white ivory, "
    "grey gray, beige tan, gold golden, silver, turquoise teal, blond blonde",
    "size": "big large huge enormous giant gigantic, small little tiny miniature",
    "height": "tall high, short low",
    "width": "wide broad thick, narrow thin slim",
    "age": "old elderly ancient, young new",
    "material": "wooden wood, metal metallic steel iron, plastic, glass, stone, brick, leather, paper",
    "pattern": "striped, spotted dotted, checkered plaid, plain",
    "shape": "round circular, square, oval, triangular, rectangular",
    "openness": "open, closed",
    "content": "empty, full",
    "wetness": "wet, dry",
    "brightness": "bright, dark",
    "cleanness": "clean, dirty",
    "number": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve",  # "one" has no plural
}
MEANINGS = {
    word: (kind, number)
    for kind, groups in ATTRIBUTES.items()
    for number, group in enumerate(groups.split(", "))
    for word in group.split()
}
ARTICLES = frozenset({"a", "an", "the"})
_NO_NOUNS = (
    "and or but nor & with without of in on at to from by for over under above below behind beside between into onto "
    "through across against around along near next upon off up down out inside outside atop beneath underneath as than "
    "while that which who is are was were be been being has have had it its his her their this these those "
    "left right top bottom side back front background foreground"
)
# An attribute or an article directly before one of these does not describe it.
NO_NOUNS = ARTICLES | frozenset(_NO_NOUNS.split())
# Not "and", "with" or "near": a cat near a dog is a dog near a cat.
_RELATIONS = (
    "on, on top of, atop, over, above, under, underneath, beneath, below, behind, in front of, to the left of, "
    "to the right of"
)
RELATIONS = tuple(relation.split() for relation in _RELATIONS.split(", "))


class Phrase(NamedTuple):
    """Some attributes and the word after them, as places among a caption's words."""

    attributes: tuple[int, ...]
    noun: int


def swapped_attributes(caption: str) -> str | None:
    """The caption with two attributes of a kind exchanged, the first that describe different things: "a red kite over a
    blue house" → "a blue kite over a red house". None where there are none.

    Attributes are words of `ATTRIBUTES` in front of a noun, not as in "the door is red", and in lower case, because
    others may be names. "Black and white cats" and "a red ball, a blue ball" would still say the same.
    """
    words = without_capital(WORD.findall(caption))
    for one, other in combinations(_phrases(words, _joined(caption)), 2):
        for first, second in product(one.attributes, other.attributes):
            (kind, meaning), (other_kind, other_meaning) = MEANINGS[words[first]], MEANINGS[words[second]]
            exchanged = list(words)
            exchanged[first], exchanged[second] = words[second], words[first]
            changes = kind == other_kind and meaning != other_meaning
            if changes and _said(exchanged, one, other) != _said(words, one, other):
                return with_words(caption, _with_articles(exchanged, (first, second)))
    return None


def swapped_objects(caption: str) -> str | None:
    """The caption with the things on either side of a relation exchanged: "a cat under a red table" → "a red table
    under a cat". None where there is no such relation.

    A thing is an article, attributes and one word that nothing else can belong to. "A fire truck on a road" and "a dog
    sits on a couch" are left alone, because only a tagger could tell a noun from a verb.
    """
    words, joined = without_capital(WORD.findall(caption)), _joined(caption)
    for relation in RELATIONS:
        for place in range(2, len(words) - len(relation) - 1):
            after = place + len(relation)
            if words[place:after] != relation:
                continue
            start, end = _start_of_thing(words, place), _end_of_thing(words, joined, after)
            if start is None or end is None or not all(joined[start + 1 : end]):
                continue
            if words[start + 1 : place] != words[after + 1 : end]:
                swapped = [*words[:start], *words[after:end], *words[place:after], *words[start:place], *words[end:]]
                return with_words(caption, swapped)
    return None


def _joined(caption: str) -> list[bool]:
    """For each word, whether only white space is between it and the word before."""
    words = list(WORD.finditer(caption))
    gaps = [caption[before.end() : word.start()] for before, word in pairwise(words)]
    return [False, *(gap.isspace() for gap in gaps)]


def _phrases(words: Sequence[str], joined: Sequence[bool]) -> list[Phrase]:
    phrases: list[Phrase] = []
    attributes: tuple[int, ...] = ()
    for place, word in enumerate(words):
        if not joined[place]:
            attributes = ()
        if word in MEANINGS:
            attributes = (*attributes, place)
            continue
        if attributes and word not in NO_NOUNS:
            phrases.append(Phrase(attributes, place))
        attributes = ()
    return phrases


def _said(words: Sequence[str], *phrases: Phrase) -> list[tuple[list[tuple[str, int]], str]]:
    """What the phrases say, in whatever order they say it."""
    return sorted((sorted(MEANINGS[words[place]] for place in own.attributes), words[own.noun]) for own in phrases)


def _with_articles(words: list[str], places: Sequence[int]) -> list[str]:
    """The words with "a" or "an" as the attributes at these places need it: for those listed the first letter tells."""
    words = list(words)
    for place in places:
        if place and words[place - 1].lower() in ("a", "an"):
            words[place - 1] = words[place - 1][0] + ("n" if words[place][0] in "aeiou" else "")
    return words


def _start_of_thing(words: Sequence[str], end: int) -> int | None:
    """The place of the article of the thing that ends before `end`."""
    start = end - 2
    while start > 0 and words[start] in MEANINGS:
        start -= 1
    return start if words[start] in ARTICLES and words[end - 1] not in NO_NOUNS else None


def _end_of_thing(words: Sequence[str], joined: Sequence[bool], start: int) -> int | None:
    """The place after the thing that begins with an article at `start`."""
    noun = start + 1
    while noun < len(words) and words[noun] in MEANINGS:
        noun += 1
    if words[start] not in ARTICLES or noun == len(words) or words[noun] in NO_NOUNS:
        return None
    end = noun + 1
    alone = end == len(words) or not joined[end] or words[end] in NO_NOUNS
    return end if alone else None
