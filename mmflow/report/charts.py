"""Charts as inline SVG text, so that a page is one file that needs no library, network or script.

Colours are CSS values (`var(--teacher)`), so the page's light, dark and print themes recolour every chart. All text is
escaped here: labels come from recipes and data, which are not trusted. matplotlib's SVG is over twice as large, takes
0.1 s a chart and 1 s to import, and writes fixed colours into every element.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

MAX_POINTS = 300  # a chart is a few hundred pixels wide: more points only make the file larger
SUFFIXES = ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from, divisor, suffix
DIGIT_WIDTH = 6.0  # of a label at 10 px, in every font of the page, rounded up

Point = tuple[float, float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart; a point whose value is None, NaN or infinite is a gap in the line."""

    name: str
    color: str
    points: Sequence[Point]
    dashed: bool = False
    ended: str = ""
    """Why the line ends before others do: the tooltip of a ring around its last point."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One part of a stacked bar; `value` in any unit, only shares are drawn; `hatched` is seen without colour."""

    label: str
    value: float
    color: str
    tooltip: str = ""
    hatched: bool = False


def is_finite(value: object) -> bool:
    """True for a real, finite number; False for None, NaN, infinities, booleans and everything else."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- axes -----------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers, evenly spaced by 1, 2, 2.5 or 5 times a power of ten; the first and last enclose [low, high].

    About `target` intervals, at most twice as many. A range that is too small for labels to differ is widened.
    """
    low, high = min(low, high), max(low, high)
    smallest_span = max(abs(low), abs(high)) * 1e-6 or 1.0
    if high - low < smallest_span:
        middle = low + (high - low) / 2
        low, high = middle - smallest_span / 2, middle + smallest_span / 2
    raw_step = high / target - low / target
    magnitude = 10.0 ** math.floor(math.log10(raw_step))
    step = next(factor * magnitude for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * magnitude >= raw_step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """One label per tick, all with the same suffix (k, M, B) and as many digits as tell them apart."""
    largest = max(map(abs, values), default=0.0)
    step = min(abs(b - a) for a, b in pairwise(values)) if len(values) > 1 else largest or 1.0
    scale, suffix = next(((s, x) for at, s, x in SUFFIXES if largest >= at), (1.0, ""))
    digits = max(4, math.ceil(math.log10(max(largest / step, 1.0))) + 2)
    return [f"{value / scale:.{digits}g}{suffix}" if round(value / step) else "0" for value in values]


class _Frame:
    """The rectangle that data is drawn in, in pixels, and the range of the data on each axis."""

    def __init__(self, width: int, height: int, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.y_ticks = ticks(*ys)
        self.left = max(map(len, tick_labels(self.y_ticks))) * DIGIT_WIDTH + 7
        self.right, self.top, self.bottom = width - 8, 8, height - 19
        self.x_low, self.x_span = xs[0], (xs[1] - xs[0]) or 1.0

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / self.x_span * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def axes(self, x_label: str, num_x_ticks: int) -> Iterator[str]:
        """Grid lines and labels; the name of the x axis stands at its last label."""
        for index, (tick, name) in enumerate(zip(self.y_ticks, tick_labels(self.y_ticks), strict=True)):
            kind, y = "grid" if index else "base", self.y(tick)
            yield f'<path class="{kind}" d="M{self.left:g},{y:.1f}H{self.right:g}"/>'
            yield f'<text class="y" x="{self.left - 5:g}" y="{y + 3.5:.1f}" text-anchor="end">{name}</text>'
        high = self.x_low + self.x_span
        x_ticks = [tick for tick in ticks(self.x_low, high, num_x_ticks) if self.x_low <= tick <= high]
        names = tick_labels(x_ticks)
        end = min(self.x(x_ticks[-1]) + len(names[-1]) * DIGIT_WIDTH / 2, self.right) if x_ticks else 0.0
        for tick, name in zip(x_ticks, names, strict=True):
            x, half = self.x(tick), len(name) * DIGIT_WIDTH / 2
            yield f'<path class="tick" d="M{x:.1f},{self.bottom:g}v3"/>'
            label, at, anchor = name, x, "middle"
            if tick == x_ticks[-1]:
                label, at, anchor = f"{x_label} {name}", end, "end"
            elif x + half > end - (len(x_label) + 1 + len(names[-1])) * DIGIT_WIDTH:
                continue  # it would be under the last one
            yield f'<text class="x" x="{at:.1f}" y="{self.bottom + 14:g}" text-anchor="{anchor}">{escape(label)}</text>'


def _open(kind: str, width: int, height: int, title: str, more: str = "") -> str:
    return f'<svg class="chart {kind}" role="img" viewBox="0 0 {width} {height}"{more}><title>{escape(title)}</title>'


# --- lines ----------------------------------------------------------------------------------------------------------


def decimate(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` of the points in order: ends, each bucket's lowest and highest, and a mark of every gap.

    Extremes and not every n-th point, because readers look for the one spike of a gradient norm.
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / max(1, limit // 3))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        bucket = range(start, min(start + size, len(points)))
        finite = [index for index in bucket if is_finite(points[index][1])]
        if finite:
            kept.add(min(finite, key=lambda index: points[index][1] or 0.0))
            kept.add(max(finite, key=lambda index: points[index][1] or 0.0))
        kept.update(next(([index] for index in bucket if not is_finite(points[index][1])), []))
    return [points[index] for index in sorted(kept)]


def runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The unbroken stretches between gaps."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None and is_finite(y) and is_finite(x):
            stretches[-1].append((x, y))
        elif stretches[-1]:
            stretches.append([])
    return stretches if stretches[-1] else stretches[:-1]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    width: int = 250,
    height: int = 142,
) -> str:
    """An SVG line chart of all series over shared axes; each line carries its points in `data-points` for a read-out.

    The x axis spans `x_range`, which has to enclose the points; without it, the points' own range.
    """
    drawn = [(line, runs(decimate(line.points))) for line in series]
    xs = [x for _, line_runs in drawn for run in line_runs for x, _ in run]
    ys = [y for _, line_runs in drawn for run in line_runs for _, y in run]
    if not xs:
        return f'{_open("line", width, height, title)}<text x="8" y="{height / 2:g}">no finite values</text></svg>'
    # A scale from zero compares honestly, but values far above zero would be flattened to a line.
    lowest = 0.0 if 0 < min(ys) < 0.4 * max(ys) else min(ys)
    frame = _Frame(width, height, x_range or (min(xs), max(xs)), (lowest, max(ys)))
    numbers = f"{frame.left:g} {frame.right:g} {frame.top:g} {frame.bottom:g} {frame.x_low!r} {frame.x_span!r}"
    parts = [_open("line", width, height, title, f' data-frame="{numbers}"'), *frame.axes(x_label, 3)]
    for line, line_runs in drawn:
        color = escape(line.color)
        # "h0" gives a point between two gaps a length, so that its round cap draws it as a dot.
        path = "".join(
            "M" + "L".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run) + ("h0" if len(run) == 1 else "")
            for run in line_runs
        )
        values = ";".join(f"{x:g},{y:.6g}" for run in line_runs for x, y in run)
        dashes = ";stroke-dasharray:3 2" if line.dashed else ""
        parts.append(
            f'<path class="series" style="stroke:{color}{dashes}" d="{path}" '
            f'data-name="{escape(line.name)}" data-points="{values}"/>'
        )
        if line.ended and line_runs:
            x, y = line_runs[-1][-1]
            parts.append(
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4" style="fill:transparent;stroke:{color}">'
                f"<title>{escape(line.ended)}</title></circle>"
            )
    return "".join(parts) + "</svg>"


# --- bars -----------------------------------------------------------------------------------------------------------


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    title: str,
    x_label: str,
    color: str,
    width: int = 400,
    height: int = 170,
) -> str:
    """An SVG histogram; `edges` has one entry more than `counts`."""
    frame = _Frame(width, height, (edges[0], edges[-1]), (0.0, max(counts, default=0.0) or 1.0))
    parts = [_open("histogram", width, height, title), *frame.axes(x_label, 8)]
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, y = frame.x(start), frame.y(count)
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(frame.x(stop) - x - 1, 0.5):.1f}" '
            f'height="{frame.bottom - y:.1f}" style="fill:{escape(color)}">'
            f"<title>{start:.3g} to {stop:.3g}: {count:,}</title></rect>"
        )
    return "".join(parts) + "</svg>"


def stacked_bar(segments: Sequence[Segment], *, title: str, height: int = 34) -> str:
    """A bar of shares, as wide as its container: positions are percentages, so that a phone does not shrink labels."""
    total = sum(segment.value for segment in segments)
    parts = [
        f'<svg class="chart stacked" role="img" width="100%" height="{height}"><title>{escape(title)}</title>'
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0,0V5" class="hatch"/></pattern></defs>'
    ]
    begin = 0.0
    for segment in segments:
        share = segment.value / total if total > 0 else 0.0
        # A nested svg clips its label; CSS drops the labels of smaller parts on narrow screens.
        size = "wide" if share >= 0.2 else "slim" if share >= 0.075 else "none"
        parts.append(
            f'<svg x="{begin * 100:.3f}%" width="{share * 100:.3f}%" height="{height}">'
            f"<title>{escape(segment.tooltip or segment.label)}</title>"
            f'<rect class="segment" width="100%" height="100%" style="fill:{escape(segment.color)}"/>'
            + ('<rect width="100%" height="100%" fill="url(#hatch)"/>' if segment.hatched else "")
            + f'<text class="{size}" x="8" y="{height / 2 + 4:g}">{escape(segment.label)}</text></svg>'
        )
        begin += share
    return "".join(parts) + "</svg>"


def heat(cells: Sequence[Sequence[float]], *, title: str, color: str = "var(--student)") -> str:
    """A grid of weights from 0 to 1, row by row, as an SVG to lay over a picture: the heavier, the more colour."""
    height, width = len(cells), max(map(len, cells), default=0)
    drawn = [
        f'<rect x="{column}" y="{row}" width="1" height="1" fill-opacity="{0.7 * weight:.3g}"/>'
        for row, weights in enumerate(cells)
        for column, weight in enumerate(weights)
        if is_finite(weight)
    ]
    return (
        f'<svg class="heat" role="img" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges" style="fill:{escape(color)}">'
        f"<title>{escape(title)}</title>{''.join(drawn)}</svg>"
    )


def meter(value: float, *, maximum: float = 1.0, color: str = "var(--ink)", mark: float | None = None) -> str:
    """A thin bar for a table cell, `value` out of `maximum`, with an optional upright mark such as a threshold.

    It decorates the figure beside it. SVG and not a CSS background, because printers drop backgrounds.
    """

    def share(number: float) -> float:
        return min(max(number / maximum, 0.0), 1.0) * 100 if is_finite(number) and maximum > 0 else 0.0

    upright = f'<rect class="mark" x="{share(mark):.2f}%" y="-2" width="2" height="9"/>' if mark is not None else ""
    return (
        '<svg class="meter" aria-hidden="true" width="100%" height="5">'
        '<rect class="track" width="100%" height="5"/>'
        f'<rect width="{share(value):.2f}%" height="5" style="fill:{escape(color)}"/>{upright}</svg>'
    )
