"""Where sentences begin, in any script, and a random run of whole ones: long texts are not to be learnt by their heads.

The rules are the part of Unicode's UAX #29 that matters here (SB4, SB6, SB8, SB8a–SB11): a text cut at a wrong place
costs an augmentation little, so abbreviations have no list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

CLOSERS = r"[\"'”’»」』）】》\)\]]*"
# Marks that nothing else is written with, so that no space need follow: Chinese and Japanese, Devanagari, Arabic, Urdu,
# Armenian, Ethiopic, Burmese, Khmer.
SURE = r"[。！？｡।॥؟۔։።፧፨။។]+"
# Marks that also stand within numbers and names: only before a space.
UNSURE = r"[.!?…]+"
END = re.compile(rf"{SURE}{CLOSERS}|(?P<unsure>{UNSURE}){CLOSERS}(?=\s+(?P<next>\S))|\n+")


def sentence_starts(text: str) -> list[int]:
    """Ascending places in the text at which its sentences begin, the first of them 0.

    A space between two sentences belongs to the second, as it does for byte-level tokenizers. A full stop before a
    small letter ends nothing (SB8).
    """
    starts = [0]
    for end in END.finditer(text):
        if end["unsure"] in (".", "…", "...") and end["next"].islower():
            continue
        if end.end() < len(text):
            starts.append(end.end())
    return starts


def sentence_window(starts: Sequence[int], total: int, room: int, draw: float) -> tuple[int, int]:
    """(first, end) of a run of whole sentences of at most `room` of a text's `total` tokens.

    `starts` are the tokens at which sentences begin. A sentence longer than `room` counts as several. By `draw`, in
    [0, 1), any of them may come first as long as the run is cut short by `room` and not by the text's end.
    """
    if total <= room:
        return 0, total
    bounds = sorted({0, *starts} - {total})
    pieces = np.array([begin for first, end in zip(bounds, [*bounds[1:], total], strict=True)
                       for begin in range(first, end, room)] + [total])  # fmt: skip
    # The first piece from which all the rest has room: later ones would show less of the same.
    last = int(np.searchsorted(pieces, total - room))
    first = int(pieces[int(draw * (last + 1))])
    return first, int(pieces[np.searchsorted(pieces, first + room, side="right") - 1])
