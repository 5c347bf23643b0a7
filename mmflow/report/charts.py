"""Charts as inline SVG text: pure functions, so that the report is one file that needs no library, network or script.

Colours are CSS values (`var(--teacher)`), which lets the page's light, dark and print themes recolour every chart.
All text is escaped here: labels come from recipes and data, which are not trusted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

# A chart is at most a few hundred pixels wide: more points than that only make the file heavier.
MAX_POINTS = 300
# Advance width of one digit at the charts' 10 px label size, in every face of the page's font stack, rounded up.
DIGIT_WIDTH = 6.0

Point = tuple[float, float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart; a point whose value is None, NaN or infinite is a gap in the line."""

    name: str
    color: str
    points: Sequence[Point]
    dashed: bool = False
    ended: str = ""
    """Why the line ends before others do: said where a ring stands round its last point."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One part of a stacked bar; `value` in any unit, as only shares are drawn; `hatched` speaks without colour."""

    label: str
    value: float
    color: str
    tooltip: str = ""
    hatched: bool = False


def is_finite(value: object) -> bool:
    """True for a real, finite number; False for None, NaN, infinities, booleans and everything else."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers, evenly spaced by 1, 2, 2.5 or 5 times a power of ten, of which the outer two enclose [low, high].

    About `target` intervals (never more than twice as many). Where low and high are equal, or closer than doubles can
    label, the range around them is widened to the smallest that still has distinct ticks.
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
    """One label a tick, all with the same number of decimals or the same suffix (k, M, B), or as powers of ten."""
    largest = max(map(abs, values), default=0.0)
    step = min((abs(b - a) for a, b in pairwise(values)), default=largest) or 1.0
    scale, suffix = next(
        ((s, x) for at, s, x in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")) if largest >= at), (1.0, "")
    )
    # 2.5 and 0.25 need one digit more than their power of ten shows, hence the search over decimals, not a logarithm.
    decimals = next((d for d in range(5) if abs(round(step / scale, d) - step / scale) < step / scale * 1e-3), 5)
    if decimals < 5 and largest < 1e13:
        return [f"{value / scale:,.{decimals}f}{suffix}" if round(value / step) else "0" for value in values]
    digits = max(1, math.ceil(math.log10(largest / step)) + 1)
    parts = [f"{value:.{digits}e}".split("e") for value in values]
    return [
        f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if round(value / step) else "0"
        for value, (mantissa, exponent) in zip(values, parts, strict=True)
    ]


def decimate(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` of the points in order: ends, each bucket's lowest and highest, and a mark of every gap.

    Extremes rather than every n-th point, because the one spike of a gradient norm is what the reader looks for.
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


def runs(points: Sequence[Point]) -> Iterator[list[tuple[float, float]]]:
    """The unbroken stretches between gaps."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None and is_finite(y) and is_finite(x):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


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
    drawn = [(line, list(runs(decimate(line.points)))) for line in series]
    xs = [x for _, line_runs in drawn for run in line_runs for x, _ in run]
    ys = [y for _, line_runs in drawn for run in line_runs for _, y in run]
    if not xs:
        return f'{_open("line", width, height, title)}<text x="8" y="{height / 2:g}">no finite values</text></svg>'
    # A scale that begins at zero compares honestly; one far above zero would flatten the curve to nothing.
    y_ticks = ticks(0.0 if 0 < min(ys) < 0.4 * max(ys) else min(ys), max(ys))
    y_names = tick_labels(y_ticks)
    left, right, top, bottom = max(map(len, y_names)) * DIGIT_WIDTH + 7, width - 8, 8, height - 19
    x_low, x_high = x_range or (min(xs), max(xs))
    x_span = (x_high - x_low) or 1.0
    y_low, y_span = y_ticks[0], y_ticks[-1] - y_ticks[0]

    def place(x: float, y: float) -> str:
        right_by, up_by = (x - x_low) / x_span * (right - left), (y - y_low) / y_span * (bottom - top)
        return f"{left + right_by:.1f},{bottom - up_by:.1f}"

    frame = f' data-frame="{left:g} {right:g} {top} {bottom} {x_low!r} {x_span!r}"'
    parts = [_open("line", width, height, title, frame), *_y_axis(y_ticks, y_names, left, right, top, bottom)]
    x_ticks = [tick for tick in ticks(x_low, x_low + x_span) if x_low <= tick <= x_low + x_span]
    for tick, name in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = left + (tick - x_low) / x_span * (right - left)
        anchor = "end" if x > right - 12 else "middle"
        label = f"{x_label} {name}" if tick == x_ticks[-1] else name
        parts.append(f'<path class="tick" d="M{x:.1f},{bottom}v3"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{height - 5}" text-anchor="{anchor}">{escape(label)}</text>')
    for line, line_runs in drawn:
        # "h0" gives a point between two gaps a length, so that its round cap draws it as a dot.
        path = "".join(
            "M" + "L".join(place(*point) for point in run) + ("h0" if len(run) == 1 else "") for run in line_runs
        )
        values = ";".join(f"{x:g},{y:.6g}" for run in line_runs for x, y in run)
        dashes = ";stroke-dasharray:3 2" if line.dashed else ""
        parts.append(
            f'<path class="series" style="stroke:{escape(line.color)}{dashes}" d="{path}" '
            f'data-name="{escape(line.name)}" data-points="{values}"/>'
        )
        if line.ended and line_runs:
            across, down = place(*line_runs[-1][-1]).split(",")
            parts.append(
                f'<circle cx="{across}" cy="{down}" r="4" style="fill:transparent;stroke:{escape(line.color)}">'
                f"<title>{escape(line.ended)}</title></circle>"
            )
    return "".join(parts) + "</svg>"


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    title: str,
    x_label: str,
    color: str = "var(--ink)",
    width: int = 400,
    height: int = 170,
) -> str:
    """An SVG histogram; `edges` has one entry more than `counts`, else ValueError."""
    if len(edges) != len(counts) + 1:
        raise ValueError(f"a histogram of {len(counts)} counts needs {len(counts) + 1} edges, got {len(edges)}")
    y_ticks = ticks(0.0, max([count for count in counts if is_finite(count)], default=0.0) or 1.0)
    y_names = tick_labels(y_ticks)
    left, right, top, bottom = max(map(len, y_names)) * DIGIT_WIDTH + 7, width - 10, 8, height - 32
    low, span = edges[0], (edges[-1] - edges[0]) or 1.0
    parts = [_open("histogram", width, height, title), *_y_axis(y_ticks, y_names, left, right, top, bottom)]
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if not is_finite(count):
            continue
        x, bar_width = left + (start - low) / span * (right - left), (stop - start) / span * (right - left)
        bar_height = count / y_ticks[-1] * (bottom - top)
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="{bottom - bar_height:.1f}" width="{max(bar_width - 1, 0.5):.1f}" '
            f'height="{bar_height:.1f}" style="fill:{escape(color)}">'
            f"<title>{start:.3g} to {stop:.3g}: {count:,}</title></rect>"
        )
    x_ticks = [tick for tick in ticks(low, low + span, 8) if low <= tick <= low + span]
    for tick, name in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = left + (tick - low) / span * (right - left)
        parts.append(f'<path class="tick" d="M{x:.1f},{bottom}v3"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{name}</text>')
    parts.append(f'<text class="x" x="{right}" y="{height - 3}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"


def stacked_bar(segments: Sequence[Segment], *, title: str, height: int = 34) -> str:
    """A bar of shares, as wide as its container: positions are percentages, so that a phone does not shrink labels."""
    total = sum(segment.value for segment in segments if is_finite(segment.value))
    parts = [
        f'<svg class="chart stacked" role="img" width="100%" height="{height}"><title>{escape(title)}</title>'
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0,0V5" class="hatch"/></pattern></defs>'
    ]
    begin = 0.0
    for segment in segments:
        share = segment.value / total if total > 0 and is_finite(segment.value) else 0.0
        if share <= 0:
            continue
        # A nested svg clips its label; below a fifth of the bar the label is dropped on narrow screens by CSS.
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

    Decorative: the figure stands beside it as text. SVG and not a CSS background, since printers drop backgrounds.
    """

    def share(number: float) -> float:
        return min(max(number / maximum, 0.0), 1.0) * 100 if is_finite(number) and maximum > 0 else 0.0

    upright = f'<rect class="mark" x="{share(mark):.2f}%" y="-2" width="2" height="9"/>' if mark is not None else ""
    return (
        '<svg class="meter" aria-hidden="true" width="100%" height="5">'
        '<rect class="track" width="100%" height="5"/>'
        f'<rect width="{share(value):.2f}%" height="5" style="fill:{escape(color)}"/>{upright}</svg>'
    )


def _open(kind: str, width: int, height: int, title: str, more: str = "") -> str:
    return f'<svg class="chart {kind}" role="img" viewBox="0 0 {width} {height}"{more}><title>{escape(title)}</title>'


def _y_axis(
    values: Sequence[float], names: Sequence[str], left: float, right: float, top: float, bottom: float
) -> list[str]:
    span = values[-1] - values[0]
    heights = [bottom - (value - values[0]) / span * (bottom - top) for value in values]
    return [
        f'<path class="{"base" if index == 0 else "grid"}" d="M{left:g},{y:.1f}H{right:g}"/>'
        f'<text class="y" x="{left - 5:g}" y="{y + 3.5:.1f}" text-anchor="end">{name}</text>'
        for index, (y, name) in enumerate(zip(heights, names, strict=True))
    ]
