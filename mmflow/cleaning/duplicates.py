"""Which records are too alike and which one stays: near pixels by Hamming distance, alike captions by MinHash.

Both searches find what a comparison of all pairs would find (MinHash nearly so), without making it. They are greedy in
the given order: a record is removed if an earlier survivor is too much like it, and names the first such survivor.

Hashes are searched by multi-index hashing (Norouzi, Punjani and Fleet, arXiv 1307.2982): the 64 bits are cut into
bands. Two hashes within the radius differ in few bits of at least one band, so only hashes that share a band's address,
or nearly so, are compared. Captions are compared by the Jaccard similarity of their words' 3-grams.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations
from math import ceil, comb, log
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mmflow.cleaning.captions import UNSPACED

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
# `run(function, count, *arrays)`: the results of function(0, *arrays) … function(count - 1, *arrays), run anywhere.
Runner = Callable[..., list[Any]]

HASH_BITS = 64
MAX_ADDRESS_BITS = 20
# Comparisons at a time: their exclusive-ors, 512 KiB, stay in a core's cache.
BLOCK, MAX_COLUMNS = 1 << 16, 1 << 12
# Hits of one band, including those that other bands find, beyond which a set is split: at most 64 MiB of pairs. 2,048
# hashes have no more among themselves, so splitting ends.
MAX_HITS = 1 << 22
# Measured in nanoseconds: a comparison, gathering a candidate, a neighbouring address, and a bucket's fixed cost.
COMPARISON_COST, CANDIDATE_COST, NEIGHBOUR_COST, BUCKET_COST = 2.5, 12.0, 65.0, 40_000.0


# --- hashes within a radius -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """An address within the hash. Candidates are hashes with addresses that differ in at most `flips` bits."""

    shift: int
    bits: int
    flips: int

    def addresses(self, hashes: Hashes) -> Places:
        """The address of each hash, (hashes,)."""
        return (hashes >> np.uint64(self.shift) & np.uint64((1 << self.bits) - 1)).astype(np.int64)

    def masks(self) -> Places:
        """Exclusive-or masks from an address to each of its neighbours, itself first."""
        flipped = chain.from_iterable(combinations(range(self.bits), flips) for flips in range(self.flips + 1))
        return np.array([sum(1 << bit for bit in bits) for bits in flipped], np.int64)


@lru_cache(256)
def plan_bands(num_hashes: int, radius: int) -> list[Band]:
    """The cheapest bands, for evenly spread hashes, that find every pair within the radius.

    By the generalised pigeonhole principle: if the bands' flips, each plus one, sum to the radius plus one, then a pair
    that misses every band differs in more bits than the radius.
    """
    plans = []
    for num_bands in range(1, radius + 2):
        flips = [(radius + 1 + number) // num_bands - 1 for number in range(num_bands)]
        ends = [HASH_BITS * number // num_bands for number in range(num_bands + 1)]
        for limit in range(1, MAX_ADDRESS_BITS + 1):
            bands = [
                Band(ends[number], min(limit, ends[number + 1] - ends[number]), flips[number])
                for number in range(num_bands)
            ]
            plans.append((sum(_cost(num_hashes, band) for band in bands), bands))
    return min(plans, key=lambda plan: plan[0])[1]


def _cost(num_hashes: int, band: Band) -> float:
    num_buckets = min(max(1, num_hashes), 1 << band.bits)
    members = num_hashes / num_buckets
    neighbours = sum(comb(band.bits, flips) for flips in range(band.flips + 1))
    candidates = members * (neighbours + 1) / 2  # each pair of neighbours once, a bucket with itself in full
    comparisons = candidates * (members * COMPARISON_COST + CANDIDATE_COST)
    return num_buckets * (BUCKET_COST + neighbours * NEIGHBOUR_COST + comparisons)


def run_here(function: Callable[..., Any], count: int, *arrays: Any) -> list[Any]:
    """A `Runner` in this process."""
    return [function(number, *arrays) for number in range(count)]


def near_owners(hashes: Hashes, radius: int, num_fixed: int = 0, run: Runner = run_here) -> Places:
    """For each hash the index of the survivor that it is too near to, or its own if it survives, (hashes,).

    The first `num_fixed` hashes always survive. Memory is bounded, however many pairs there are.
    """
    owners = np.arange(len(hashes), dtype=np.int64)
    rest = _claim(hashes, owners[:num_fixed].copy(), owners[num_fixed:].copy(), owners, radius, run)
    _settle(hashes, rest, owners, radius, run)
    return owners


def _settle(hashes: Hashes, members: Places, owners: Places, radius: int, run: Runner) -> None:
    """Set the owners of members that are near no earlier survivor.

    If they have more pairs than memory, the first quarter is settled by itself. What its survivors claim of the rest,
    nearly all of a dense crowd, needs no pairs any more.
    """
    pairs = near_pairs(hashes[members], radius, run)
    if pairs is not None:
        owners[members] = members[greedy_owners(pairs, len(members))]
        return
    quarter = max(1, len(members) // 4)
    first, second = members[:quarter], members[quarter:]
    _settle(hashes, first, owners, radius, run)
    rest = _claim(hashes, first[owners[first] == first], second, owners, radius, run)
    _settle(hashes, rest, owners, radius, run)


def _claim(hashes: Hashes, survivors: Places, others: Places, owners: Places, radius: int, run: Runner) -> Places:
    """Give each of the others that is near a survivor to the first such survivor; return the rest of them."""
    if not len(survivors) or not len(others):
        return others
    count = len(plan_bands(max(len(survivors), len(others)), radius))
    claims = np.minimum.reduce(run(_claims_of_band, count, hashes[survivors], hashes[others], radius))
    taken = claims < len(survivors)
    owners[others[taken]] = survivors[claims[taken]]
    rest: Places = others[~taken]
    return rest


def _claims_of_band(number: int, survivors: Hashes, others: Hashes, radius: int) -> Places:
    """The first survivor near each of the others, (others,); the number of survivors if there is none."""
    claims = np.full(len(others), len(survivors), np.int64)
    for _, pairs in _search(number, survivors, others, radius):
        np.minimum.at(claims, pairs[:, 1], pairs[:, 0])
    return claims


def greedy_owners(pairs: Places, number: int) -> Places:
    """For each of `number` the survivor that it is paired with, or its own index if it survives, (number,).

    `pairs` (pairs, 2) are sorted, the lesser index first.
    """
    owners = np.arange(number, dtype=np.int64)
    firsts, starts = np.unique(pairs[:, 0], return_index=True)
    ends = np.append(starts, len(pairs))[1:]
    seconds = pairs[:, 1]
    for first, start, end in zip(firsts.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if owners[first] == first:
            others = seconds[start:end]
            owners[others[owners[others] == others]] = first
    return owners


def near_pairs(hashes: Hashes, radius: int, run: Runner = run_here) -> Places | None:
    """All pairs within the radius, (pairs, 2), the lesser index first, sorted; None if a band has over `MAX_HITS`."""
    found = run(_pairs_of_band, len(plan_bands(len(hashes), radius)), hashes, radius)
    if any(pairs is None for pairs in found):
        return None
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _pairs_of_band(number: int, hashes: Hashes, radius: int) -> Places | None:
    found, total = [np.empty((0, 2), np.int64)], 0
    for hits, pairs in _search(number, hashes, hashes, radius):
        found.append(pairs)
        total += hits
        if total > MAX_HITS:
            return None
    return np.concatenate(found)


def _search(number: int, left: Hashes, right: Hashes, radius: int) -> Iterator[tuple[int, Places]]:
    """Pairs (left, right) within the radius that this band finds and no earlier band: blocks of (hits, (pairs, 2)).

    If both arrays are one, each pair of two different places comes once, the lesser first.
    """
    bands = plan_bands(max(len(left), len(right)), radius)
    band, earlier = bands[number], bands[:number]
    same = left is right
    left_order, left_sorted, left_starts = _bucket(left, band)
    right_order, right_sorted, right_starts = (left_order, left_sorted, left_starts) if same else _bucket(right, band)
    masks = band.masks()
    positions = np.arange(max(len(left), len(right)))
    # Reused: allocating fresh blocks each time would cost more than the comparisons.
    differing_buffer, count_buffer = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint8)
    starts = left_starts.tolist()
    for address in np.flatnonzero(np.diff(left_starts)).tolist():
        neighbours = address ^ masks
        if same:  # the other direction is found from the neighbour
            neighbours = neighbours[neighbours >= address]
        candidates = _ranges(positions, right_starts[neighbours], right_starts[neighbours + 1])
        for first, start, rows, columns in _blocks(candidates, positions[starts[address] : starts[address + 1]]):
            if same and first + len(columns) <= start:  # a bucket with itself: the upper triangle is enough
                continue
            shape, size = (len(rows), len(columns)), len(rows) * len(columns)
            differing, count = differing_buffer[:size].reshape(shape), count_buffer[:size].reshape(shape)
            np.bitwise_xor(left_sorted[rows, None], right_sorted[columns], out=differing)
            np.bitwise_count(differing, out=count)
            if same:  # or each hash would match itself
                own = positions[max(0, first - start) : max(0, min(len(rows), first + len(columns) - start))]
                count[own, own + (start - first)] = HASH_BITS
            if count.min() > radius:
                continue
            row, column = np.nonzero(count <= radius)
            hits = len(row)
            if same:
                forward = rows[row] < columns[column]
                row, column = row[forward], column[forward]
            if earlier:
                new = ~_found_by(earlier, differing[row, column])
                row, column = row[new], column[new]
            one, other = left_order[rows[row]], right_order[columns[column]]
            if same:
                one, other = np.minimum(one, other), np.maximum(one, other)
            yield hits, np.stack([one, other], axis=1)


def _blocks(columns: Places, rows: Places) -> Iterator[tuple[int, int, Places, Places]]:
    """All rows against all columns: (position of the first column, of the first row, rows, columns)."""
    for first in range(0, len(columns), MAX_COLUMNS):
        block = columns[first : first + MAX_COLUMNS]
        step = BLOCK // len(block)
        for start in range(0, len(rows), step):
            yield first, start, rows[start : start + step], block


def _bucket(hashes: Hashes, band: Band) -> tuple[Places, Hashes, Places]:
    """The order by address, the hashes in that order, and where each address starts, (addresses + 1,)."""
    addresses = band.addresses(hashes)
    order = np.argsort(addresses, kind="stable")
    starts = np.zeros((1 << band.bits) + 1, np.int64)
    np.cumsum(np.bincount(addresses, minlength=1 << band.bits), out=starts[1:])
    return order, hashes[order], starts


def _ranges(positions: Places, starts: Places, ends: Places) -> Places:
    """The ranges start … end - 1, one after another. `positions` is 0, 1, …"""
    if len(starts) == 1:
        return positions[starts[0] : ends[0]]
    counts = ends - starts
    shifts = starts - (np.cumsum(counts) - counts)
    ranges: Places = positions[: counts.sum()] + np.repeat(shifts, counts)
    return ranges


def _found_by(bands: list[Band], differing: Hashes) -> npt.NDArray[np.bool_]:
    """Whether one of the bands finds each pair, given the bits in which it differs."""
    found = np.zeros(len(differing), np.bool_)
    for band in bands:
        found |= np.bitwise_count(band.addresses(differing)) <= band.flips
    return found


# --- alike captions ---------------------------------------------------------------------------------------------------

RECALL = 0.999  # share of the pairs at the threshold that become candidates; more of the more similar ones
MAX_ROWS, MAX_BANDS = 5, 32
BATCH = 1 << 14  # texts at a time: some 200,000 3-grams, 1.6 MB, which stay in the cache
PUNCTUATION = re.compile(r"^[^\w]+|[^\w]+$")
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 / φ, an odd factor that mixes bits

Shingles = frozenset[tuple[str, ...]]


def shingles(text: str) -> Shingles:
    """The 3-grams of the text's words, case-folded and without surrounding punctuation; the words if fewer than three.

    In scripts without spaces, such as Chinese, each character is a word.
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
    """(rows per band, bands): the longest bands that still find `RECALL` of the pairs at the threshold.

    With five rows few pairs below one half become candidates; longer bands cost more than they save. Below a threshold
    of 0.2, `MAX_BANDS` finds fewer pairs than `RECALL`.
    """
    for rows in range(MAX_ROWS, 1, -1):
        miss = 1 - threshold**rows
        bands = 1 if miss <= 0 else ceil(log(1 - RECALL) / log(miss))
        if bands <= MAX_BANDS:
            return rows, bands
    return 1, MAX_BANDS


def bands_of_texts(texts: Sequence[str], threshold: float) -> Hashes:
    """(texts, bands): texts that share a value are candidates. The same text gives the same values everywhere."""
    rows, bands = plan_minhash(threshold)
    parts = [_bands_of_batch(texts[start : start + BATCH], rows, bands) for start in range(0, len(texts), BATCH)]
    return np.concatenate([np.empty((0, bands), np.uint64), *parts])


def _bands_of_batch(texts: Sequence[str], rows: int, bands: int) -> Hashes:
    sets = [shingles(text) or frozenset([("",)]) for text in texts]
    hashed = [xxhash.xxh3_64_intdigest(" ".join(shingle).encode()) for shingle in chain.from_iterable(sets)]
    hashes = np.array(hashed, np.uint64)
    starts = np.zeros(len(sets), np.int64)
    np.cumsum([len(shingle_set) for shingle_set in sets[:-1]], out=starts[1:])
    # Linear maps of 64 bits with odd factors: the same on every machine and in every release of numpy.
    constants = [xxhash.xxh3_64_intdigest(b"mmflow minhash", seed) for seed in range(2 * rows * bands)]
    values = np.empty((len(sets), bands), np.uint64)
    for band in range(bands):
        value = np.full(len(sets), band, np.uint64)
        for row in range(rows):
            factor, term = constants[2 * (band * rows + row) :][:2]
            least = np.minimum.reduceat(hashes * np.uint64(factor | 1) + np.uint64(term), starts)
            value = (value ^ least) * np.uint64(GOLDEN_RATIO)
            value ^= value >> np.uint64(29)
        values[:, band] = value
    return values


def alike_owners(
    sets: Sequence[Shingles], buckets: Sequence[Sequence[int]], threshold: float, num_fixed: int
) -> tuple[Places, npt.NDArray[np.float64]]:
    """For each set the index of the survivor that it is too similar to, or its own, and their similarity, (sets,) each.

    Only sets that share a bucket are compared. The first `num_fixed` always survive. Only survivors are remembered, so
    thousands of similar captions need no memory for their pairs.
    """
    survivors: dict[int, list[int]] = {}
    owners, degrees = np.arange(len(sets)), np.ones(len(sets))
    for place, (own, own_buckets) in enumerate(zip(sets, buckets, strict=True)):
        if place >= num_fixed:
            for other in sorted({other for bucket in own_buckets for other in survivors.get(bucket, ())}):
                degree = similarity(own, sets[other])
                if degree >= threshold:
                    owners[place], degrees[place] = other, degree
                    break
        if owners[place] == place:
            for bucket in own_buckets:
                survivors.setdefault(bucket, []).append(place)
    return owners, degrees


def group_buckets(places: Places, members: Places, buckets: Places) -> list[list[int]]:
    """The buckets of each place, given the bucket of each member, (places,)."""
    index = {place: number for number, place in enumerate(places.tolist())}
    grouped: list[list[int]] = [[] for _ in index]
    for member, bucket in zip(members.tolist(), buckets.tolist(), strict=True):
        grouped[index[member]].append(bucket)
    return grouped
