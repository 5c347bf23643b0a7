"""Which of many are too alike, and who stays: exact search within a Hamming radius, without looking at every pair.

Hashes come in the order of who stays first. The search is multi-index hashing (Norouzi, Punjani and Fleet, arXiv
1307.2982): the 64 bits are cut into bands, and two hashes within the radius differ in few bits of at least one band, so
that only those are compared which share a band's address, or nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
# `run(function, count, *arrays)`: the results of function(0, *arrays) … function(count - 1, *arrays), run anywhere.
Runner = Callable[..., list[Any]]

HASH_BITS = 64
MAX_ADDRESS_BITS = 20
# Comparisons at a time: their exclusive-ors, 512 KiB, stay in a core's cache.
BLOCK, MAX_COLUMNS = 1 << 16, 1 << 12
# Hits of one band, what other bands find too among them, at which a set is cut up instead: at most 64 MiB of pairs.
# 2,048 hashes have no more among themselves, so that cutting ends.
MAX_HITS = 1 << 22
# Measured, in nanoseconds: a comparison, a candidate's gathering, a neighbouring address, and a bucket's fixed cost.
COMPARISON_COST, CANDIDATE_COST, NEIGHBOUR_COST, BUCKET_COST = 2.5, 12.0, 65.0, 40_000.0


@dataclass(frozen=True)
class Band:
    """An address within the hash: candidates are those whose addresses differ in at most `flips` bits."""

    shift: int
    bits: int
    flips: int

    def addresses(self, hashes: Hashes) -> Places:
        """The address of each hash, (hashes,)."""
        return (hashes >> np.uint64(self.shift) & np.uint64((1 << self.bits) - 1)).astype(np.int64)

    def masks(self) -> Places:
        """What turns an address into each of its neighbours, itself first."""
        flipped = [combinations(range(self.bits), flips) for flips in range(self.flips + 1)]
        return np.array([sum(1 << bit for bit in bits) for some in flipped for bits in some], np.int64)


@lru_cache(256)
def plan_bands(num_hashes: int, radius: int) -> list[Band]:
    """The bands that find every pair within the radius, chosen by the cost that they have on evenly spread hashes.

    By the pigeonhole principle, in its general form: where the bands' flips, each plus one, sum to the radius plus one,
    a pair that misses every band differs in more bits than the radius.
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


def near_pairs(hashes: Hashes, radius: int) -> Places:
    """All pairs within the radius, (pairs, 2), the lesser index first, sorted: up to the hashes' number squared."""
    count = len(plan_bands(len(hashes), radius))
    found = [pairs for number in range(count) for _, pairs in _search(number, hashes, hashes, radius)]
    return _sorted_pairs(found)


def near_owners(hashes: Hashes, radius: int, num_fixed: int = 0, run: Runner | None = None) -> Places:
    """Of each hash the index of the survivor that it is too near to, its own where it survives, (hashes,).

    Greedy in the order given: a hash goes exactly when an earlier survivor is within the radius, and names the first
    of these. The first `num_fixed` survive whatever they are like. Memory is bounded however many pairs there are.
    """
    run = run or run_here
    owners = np.arange(len(hashes), dtype=np.int64)
    rest = _claim(hashes, owners[:num_fixed].copy(), owners[num_fixed:].copy(), owners, radius, run)
    _settle(hashes, rest, owners, radius, run)
    return owners


def _settle(hashes: Hashes, members: Places, owners: Places, radius: int, run: Runner) -> None:
    """Set the owners of the members, to whom no survivor before them is near.

    Where they have more pairs than memory, the first quarter is settled by itself: what its survivors claim of the
    rest, nearly all of a dense crowd, needs no pairs any more.
    """
    pairs = _bounded_pairs(hashes[members], radius, run)
    if pairs is not None:
        owners[members] = members[greedy_owners(pairs, len(members))]
        return
    quarter = max(1, len(members) // 4)
    first, second = members[:quarter], members[quarter:]
    _settle(hashes, first, owners, radius, run)
    rest = _claim(hashes, first[owners[first] == first], second, owners, radius, run)
    _settle(hashes, rest, owners, radius, run)


def _claim(hashes: Hashes, survivors: Places, others: Places, owners: Places, radius: int, run: Runner) -> Places:
    """Give each of the others that is near a survivor to the first such; return the rest of them."""
    if not len(survivors) or not len(others):
        return others
    count = len(plan_bands(max(len(survivors), len(others)), radius))
    found = run(_claims_of_band, count, hashes[survivors], hashes[others], radius)
    claims = np.minimum.reduce(found)
    taken = claims < len(survivors)
    owners[others[taken]] = survivors[claims[taken]]
    rest: Places = others[~taken]
    return rest


def greedy_owners(pairs: Places, number: int) -> Places:
    """Of each of `number` the survivor that it is paired with, its own index where it survives, (number,).

    `pairs` (pairs, 2) are sorted, the lesser index first; who comes first survives.
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


def run_here(function: Callable[..., Any], count: int, *arrays: Any) -> list[Any]:
    """A `Runner` in this process."""
    return [function(number, *arrays) for number in range(count)]


def _claims_of_band(number: int, survivors: Hashes, others: Hashes, radius: int) -> Places:
    """The first survivor near each of the others, (others,); the number of survivors where there is none."""
    claims = np.full(len(others), len(survivors), np.int64)
    for _, pairs in _search(number, survivors, others, radius):
        np.minimum.at(claims, pairs[:, 1], pairs[:, 0])
    return claims


def _bounded_pairs(hashes: Hashes, radius: int, run: Runner) -> Places | None:
    """`near_pairs`, or None where a band has too many."""
    count = len(plan_bands(len(hashes), radius))
    found = run(_pairs_of_band, count, hashes, radius)
    if any(pairs is None for pairs in found):
        return None
    return _sorted_pairs(found)


def _pairs_of_band(number: int, hashes: Hashes, radius: int) -> Places | None:
    found, total = [], 0
    for hits, pairs in _search(number, hashes, hashes, radius):
        found.append(pairs)
        total += hits
        if total > MAX_HITS:
            return None
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def _sorted_pairs(found: list[Places]) -> Places:
    pairs = np.concatenate([np.empty((0, 2), np.int64), *found])
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _search(number: int, left: Hashes, right: Hashes, radius: int) -> Iterator[tuple[int, Places]]:
    """Pairs (left, right) within the radius that this band finds and no band before it: blocks of (hits, (pairs, 2)).

    With one array for both, each pair of two different places once, the lesser first.
    """
    bands = plan_bands(max(len(left), len(right)), radius)
    band, before = bands[number], bands[:number]
    same = left is right
    left_order, left_sorted, left_starts = _bucket(left, band)
    right_order, right_sorted, right_starts = (left_order, left_sorted, left_starts) if same else _bucket(right, band)
    masks = band.masks()
    positions = np.arange(max(len(left), len(right)))
    # Reused: blocks of fresh memory each time would cost more than the comparisons.
    differing_buffer, count_buffer = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint8)
    starts = left_starts.tolist()
    for address in np.flatnonzero(np.diff(left_starts)).tolist():
        neighbours = address ^ masks
        if same:  # the other direction is the neighbour's turn
            neighbours = neighbours[neighbours >= address]
        candidates = _ranges(positions, right_starts[neighbours], right_starts[neighbours + 1])
        for first, start, rows, some in _blocks(candidates, positions[starts[address] : starts[address + 1]]):
            if same and first + len(some) <= start:  # of a bucket with itself the upper triangle is enough
                continue
            shape, size = (len(rows), len(some)), len(rows) * len(some)
            differing, count = differing_buffer[:size].reshape(shape), count_buffer[:size].reshape(shape)
            np.bitwise_xor(left_sorted[rows, None], right_sorted[some], out=differing)
            np.bitwise_count(differing, out=count)
            if same:  # or each hash would be a hit of its own
                own = positions[max(0, first - start) : max(0, min(len(rows), first + len(some) - start))]
                count[own, own + (start - first)] = HASH_BITS
            if count.min() > radius:
                continue
            row, column = np.nonzero(count <= radius)
            hits = len(row)
            if same:
                forward = rows[row] < some[column]
                row, column = row[forward], column[forward]
            if before:
                new = ~_found_by(before, differing[row, column])
                row, column = row[new], column[new]
            one, other = left_order[rows[row]], right_order[some[column]]
            if same:
                one, other = np.minimum(one, other), np.maximum(one, other)
            yield hits, np.stack([one, other], axis=1)


def _blocks(columns: Places, rows: Places) -> Iterator[tuple[int, int, Places, Places]]:
    """All rows against all columns: (first column's number, first row's number, rows, columns)."""
    for first in range(0, len(columns), MAX_COLUMNS):
        some = columns[first : first + MAX_COLUMNS]
        step = BLOCK // len(some)
        for start in range(0, len(rows), step):
            yield first, start, rows[start : start + step], some


def _bucket(hashes: Hashes, band: Band) -> tuple[Places, Hashes, Places]:
    """The order by address, the hashes in it, and where each address starts, (addresses + 1,)."""
    addresses = band.addresses(hashes)
    order = np.argsort(addresses, kind="stable")
    starts = np.zeros((1 << band.bits) + 1, np.int64)
    np.cumsum(np.bincount(addresses, minlength=1 << band.bits), out=starts[1:])
    return order, hashes[order], starts


def _ranges(positions: Places, starts: Places, ends: Places) -> Places:
    """Of the positions 0, 1, … those from start to end - 1 of each, one after another."""
    if len(starts) == 1:
        return positions[starts[0] : ends[0]]
    counts = ends - starts
    shifts = starts - (np.cumsum(counts) - counts)
    ranges: Places = positions[: counts.sum()] + np.repeat(shifts, counts)
    return ranges


def _found_by(bands: list[Band], differing: Hashes) -> npt.NDArray[np.bool_]:
    """Whether one of the bands gives these pairs, by the bits in which they differ."""
    found = np.zeros(len(differing), np.bool_)
    for band in bands:
        found |= np.bitwise_count(band.addresses(differing)) <= band.flips
    return found
