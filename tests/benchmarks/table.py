"""The page of results, with a section per subject, so that one subject can be measured again alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD = """# Beside peers

Written by `make bench`; `python -m tests.benchmarks NAME` measures one subject again. Both sides in turn, each run in a
fresh process; figures are medians, ratios are medians of the ratios of the rounds. ✓ and ✗: whether the goal was met.
A round of `distillation` is a seed.
"""
COLUMNS = ("what", "mmflow", "peer", "peer's", "unit", "ratio", "goal", "note")
SECTION = re.compile(r"^## (\S+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table. `ratio` is how many times better mmflow is; without a peer there is only `ours`."""

    name: str
    ours: float
    unit: str
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """The row's text, in the order of `COLUMNS`."""
        mark = {None: "", True: " ✓", False: " ✗"}[self.met]
        theirs = "" if self.theirs is None else number(self.theirs)
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}×" if self.ratio < 10 else f"{self.ratio:.1f}×"
        return [self.name, number(self.ours), self.peer, theirs, self.unit, ratio, self.goal + mark, self.note]


def faster(
    name: str,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[float],
    *,
    unit: str = "samples/s",
    goal: float | None = None,
    note: str = "",
) -> Row:
    """The row of two rates, a value a round each; `goal` is the least ratio that is asked."""
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return Row(
        name=name,
        ours=statistics.median(ours),
        unit=unit,
        peer=peer,
        theirs=statistics.median(theirs),
        ratio=ratio,
        goal="" if goal is None else f"≥ {goal:g}×",
        met=None if goal is None else ratio >= goal,
        note=note,
    )


def bounded(name: str, values: Sequence[float], *, unit: str, most: float, note: str = "") -> Row:
    """The row of a figure that has a bound instead of a peer."""
    ours = statistics.median(values)
    return Row(name=name, ours=ours, unit=unit, goal=f"< {most:g}", met=ours < most, note=note)


def publish(results: Path, name: str, rows: Sequence[Row], foot: str) -> None:
    """Replace a subject's section on the page, at once: a later subject that fails must not lose what was measured."""
    part = section(name, rows, foot)
    page = results.read_text(encoding="utf-8") if results.exists() else ""
    results.write_text(merge(page, {name: part}), encoding="utf-8")
    print(part)


def number(value: float) -> str:
    """At least three digits: 0.0123, 4.56, 78.9, 1,234."""
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    digits = 2
    while abs(value) * 10 ** (digits - 2) < 1:
        digits += 1
    return f"{value:,.{digits if abs(value) < 10 else 1}f}"


def section(name: str, rows: Sequence[Row], foot: str) -> str:
    """A subject's part of the page."""
    lines = [f"## {name}", "", f"| {' | '.join(COLUMNS)} |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row.cells())} |" for row in rows]
    return "\n".join([*lines, "", foot, ""])


def sections(page: str) -> dict[str, str]:
    """The parts of a page by subject."""
    _, *parts = SECTION.split(page)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name: f"## {name}\n\n{body.strip()}\n" for name, body in pairs}


def merge(page: str, new: Mapping[str, str]) -> str:
    """The page with the new sections, which replace those of the same name, in alphabetical order."""
    merged = {**sections(page), **{name: part.strip() + "\n" for name, part in new.items()}}
    return "\n".join([HEAD, *(merged[name] for name in sorted(merged))])
