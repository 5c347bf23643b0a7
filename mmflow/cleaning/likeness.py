"""Captions that are too alike: MinHash finds the candidates, their words decide.

A caption is the set of its words' 3-grams; two are alike by the Jaccard similarity of these sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from math import ceil, log

import numpy as np
import numpy.typing as npt
import xxhash

from mmflow.cleaning.captions import UNSPACED

# Of pairs at the threshold itself so many are candidates; of more similar ones more.
RECALL = 0.999
MAX_ROWS, MAX_BANDS = 5, 32
BATCH = 1 << 14  # texts at a time: some 200,000 3-grams, 1.6 MB, which stay in the cache
PUNCTUATION = re.compile(r"^[^\w]+|[^\w]+$")

Shingles = frozenset[tuple[str, ...]]


def shingles(text: str) -> Shingles:
    """The 3-grams of the text's words, case folded and without punctuation around them; its words if it has fewer.

    Where words are not spaced, in Chinese say, each character is a word.
    """
    text = text.casefold()
    words = (text if text.isascii() else UNSPACED.sub(r" \g<0> ", text)).split()
    words = [word if word.isalnum() else PUNCTUATION.sub("", word) or word for word in words]
    if len(words) < 3:
        return frozenset((word,) for word in words)
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def similarity(one: Shingles, other: Shingles) -> float:
    """Their Jaccard similarity, 0 to 1."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0


def plan_minhash(threshold: float) -> tuple[int, int]:
    """(rows of a band, bands): the longest bands that still find `RECALL` of the pairs at the threshold.

    Of those less than half alike five rows let few become candidates; longer bands cost more than they spare. Below a
    threshold of 0.2 the bands that there may be find fewer.
    """
    for rows in range(MAX_ROWS, 1, -1):
        miss = 1 - threshold**rows
        bands = 1 if miss <= 0 else ceil(log(1 - RECALL) / log(miss))
        if bands <= MAX_BANDS:
            return rows, bands
    return 1, MAX_BANDS


def bands_of_texts(texts: Sequence[str], threshold: float) -> npt.NDArray[np.uint64]:
    """(texts, bands): texts that share a value are candidates. The same text gives the same values everywhere."""
    rows, bands = plan_minhash(threshold)
    parts = [_bands_of_batch(texts[start : start + BATCH], rows, bands) for start in range(0, len(texts), BATCH)]
    return np.concatenate([np.empty((0, bands), np.uint64), *parts])


def _bands_of_batch(texts: Sequence[str], rows: int, bands: int) -> npt.NDArray[np.uint64]:
    sets = [shingles(text) or frozenset([("",)]) for text in texts]
    hashed = [xxhash.xxh3_64_intdigest(" ".join(shingle).encode()) for shingle in chain.from_iterable(sets)]
    hashes = np.array(hashed, np.uint64)
    starts = np.zeros(len(sets), np.int64)
    np.cumsum([len(some) for some in sets[:-1]], out=starts[1:])
    # Linear maps of 64 bits, by odd factors: the same on every machine and in every release of numpy.
    constants = [xxhash.xxh3_64_intdigest(b"mmflow minhash", seed) for seed in range(2 * rows * bands)]
    values = np.empty((len(sets), bands), np.uint64)
    for band in range(bands):
        value = np.full(len(sets), band, np.uint64)
        for row in range(rows):
            factor, term = constants[2 * (band * rows + row) :][:2]
            least = np.minimum.reduceat(hashes * np.uint64(factor | 1) + np.uint64(term), starts)
            value = (value ^ least) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
        values[:, band] = value
    return values


def alike_owners(
    sets: Sequence[Shingles], buckets: Sequence[Sequence[int]], threshold: float, num_fixed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Of each the index of the survivor that it is too like, its own where it survives, and how like, (sets,) each.

    Greedy in the order given, over those that share a bucket: who goes names the first survivor that is alike. The
    first `num_fixed` survive whatever they are like. Only survivors are remembered, so that thousands of like captions
    take no memory for their pairs.
    """
    survivors: dict[int, list[int]] = {}
    owners, degrees = np.arange(len(sets)), np.ones(len(sets))
    for place, (own, some) in enumerate(zip(sets, buckets, strict=True)):
        if place >= num_fixed:
            for other in sorted({other for bucket in some for other in survivors.get(bucket, ())}):
                degree = similarity(own, sets[other])
                if degree >= threshold:
                    owners[place], degrees[place] = other, degree
                    break
        if owners[place] == place:
            for bucket in some:
                survivors.setdefault(bucket, []).append(place)
    return owners, degrees


def group_buckets(
    places: npt.NDArray[np.int64], members: npt.NDArray[np.int64], buckets: npt.NDArray[np.int64]
) -> list[list[int]]:
    """The buckets that each of the places is a member of, (places,)."""
    index = {place: number for number, place in enumerate(places.tolist())}
    grouped: list[list[int]] = [[] for _ in index]
    for member, bucket in zip(members.tolist(), buckets.tolist(), strict=True):
        grouped[index[member]].append(bucket)
    return grouped
