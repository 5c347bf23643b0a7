"""Axes enclose the data, labels differ, gaps stay gaps, and labels cannot inject markup."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmflow.report.charts import (
    Segment,
    Series,
    decimate,
    heat,
    histogram,
    line_chart,
    meter,
    stacked_bar,
    tick_labels,
    ticks,
)

numbers = st.floats(-1e12, 1e12, allow_subnormal=False).filter(lambda number: number == 0 or abs(number) > 1e-12)
values = st.one_of(numbers, st.none(), st.just(math.nan), st.just(math.inf))
HOSTILE = "<script>alert(1)</script>\"'&"


def drawn_paths(svg: str) -> list[str]:
    return re.findall(r'class="series"[^>]* d="([^"]*)"', svg)


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


def chart(points: list[tuple[float, float | None]]) -> str:
    return line_chart([Series(name="teacher", color="red", points=points)], title="loss", x_label="step")


@given(numbers, numbers, st.integers(2, 10))
def test_ticks_enclose_the_range_evenly_and_are_few(low: float, high: float, target: int) -> None:
    low, high = min(low, high), max(low, high)
    made = ticks(low, high, target)
    step = made[1] - made[0]
    assert made[0] <= low + step * 1e-6
    assert made[-1] >= high - step * 1e-6
    assert all(b - a == pytest.approx(step, rel=1e-3) for a, b in pairwise(made))
    assert 2 <= len(made) <= 2 * target + 2


@given(numbers, numbers)
def test_tick_steps_are_round(low: float, high: float) -> None:
    assume(abs(high - low) > 1e-3 * max(abs(low), abs(high)))
    made = ticks(low, high)
    step = (made[-1] - made[0]) / (len(made) - 1)
    mantissa = step / 10.0 ** math.floor(math.log10(step * 1.0001))
    assert min(abs(mantissa - round_one) for round_one in (1, 2, 2.5, 5)) < 1e-3


@given(numbers, numbers)
def test_tick_labels_differ_and_are_short(low: float, high: float) -> None:
    labels = tick_labels(ticks(low, high))
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 16


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 9, ["0", "2.5", "5", "7.5", "10"]),
        (0, 0.001, ["0", "0.00025", "0.0005", "0.00075", "0.001"]),
        (0, 2_000_000, ["0", "0.5M", "1M", "1.5M", "2M"]),
        (0, 700, ["0", "200", "400", "600", "800"]),
        (-0.2, 0.2, ["-0.2", "-0.1", "0", "0.1", "0.2"]),
    ],
)
def test_ticks_read_as_people_write_them(low: float, high: float, expected: list[str]) -> None:
    assert tick_labels(ticks(low, high)) == expected


def test_flat_curve_still_has_an_axis() -> None:
    assert len(set(tick_labels(ticks(3.0, 3.0)))) >= 2
    assert drawn_paths(chart([(0, 3.0), (1, 3.0)]))[0].count("L") == 1


@pytest.mark.parametrize("gap", [None, math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_break_the_line(gap: float | None) -> None:
    path = drawn_paths(chart([(0, 1.0), (1, 2.0), (2, gap), (3, 3.0), (4, 4.0)]))[0]
    assert path.count("M") == 2
    assert path.count("L") == 2
    assert "nan" not in path
    assert "inf" not in path


def test_a_value_alone_between_gaps_is_drawn_as_a_dot() -> None:
    assert re.fullmatch(r"M[\d.]+,[\d.]+h0", drawn_paths(chart([(0, None), (1, 2.0), (2, None)]))[0])


def test_a_curve_without_any_finite_value_says_so() -> None:
    assert "no finite values" in chart([(0, math.nan), (1, None)])


@given(st.lists(st.tuples(st.integers(0, 10**6), values), min_size=1, max_size=40))
def test_lines_stay_inside_their_chart(points: list[tuple[float, float | None]]) -> None:
    svg = chart(points)
    ElementTree.fromstring(svg)
    for path in drawn_paths(svg):
        assert all(-0.1 <= x <= 250.1 and -0.1 <= y <= 142.1 for x, y in coordinates(path))


@given(st.lists(values, min_size=1, max_size=2000), st.integers(12, 300))
def test_decimation_keeps_order_ends_extremes_and_gaps(column: list[float | None], limit: int) -> None:
    points: list[tuple[float, float | None]] = [(float(x), y) for x, y in enumerate(column)]
    kept = decimate(points, limit)
    assert len(kept) <= limit + 5 or len(kept) == len(points)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert kept[0][0] == 0
    assert kept[-1][0] == len(points) - 1

    def finite(some: list[tuple[float, float | None]]) -> list[float]:
        return [y for _, y in some if y is not None and math.isfinite(y)]

    assert (min(finite(points), default=0), max(finite(points), default=0)) == (
        min(finite(kept), default=0),
        max(finite(kept), default=0),
    )
    assert (len(finite(kept)) < len(kept)) == (len(finite(points)) < len(points))


def test_all_charts_of_a_page_can_share_one_range_of_steps() -> None:
    line = Series(name="student", color="red", points=[(0, 1.0), (500, 2.0)])
    narrow = line_chart([line], title="loss", x_label="step", x_range=(0, 1000))
    wide = line_chart([line], title="loss", x_label="step")
    (narrow_end, _), (wide_end, _) = (coordinates(drawn_paths(svg)[0])[-1] for svg in (narrow, wide))
    assert wide_end == pytest.approx(242, abs=1)
    assert narrow_end < 140


def test_histogram_bars_have_the_height_of_their_counts() -> None:
    svg = histogram([0.0, 0.5, 1.0, 1.5], [10, 40, 0], title="scores", x_label="similarity", color="red")
    heights = [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.5)
    assert heights[2] == 0
    assert "0.5 to 1: 40" in svg


def test_the_name_of_an_axis_covers_no_other_label() -> None:
    svg = histogram(
        [place / 10 for place in range(-10, 11)], [1] * 20, title="scores", x_label="similarity", color="red"
    )
    labels = re.findall(r'<text class="x" x="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    (end, last), others = labels[-1], labels[:-1]
    assert last == "similarity 1"
    assert len(others) > 4
    assert all(float(x) + 3 * len(text) <= float(end) - 6 * len(last) for x, text in others)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(lambda parts: sum(parts) > 1e-3))
def test_stacked_shares_fill_the_bar_exactly(parts: list[float]) -> None:
    segments = [Segment(label=f"stage {i}", value=part, color="red") for i, part in enumerate(parts)]
    svg = stacked_bar(segments, title="time")
    widths = [float(width) for width in re.findall(r'<svg x="[\d.]+%" width="([\d.]+)%"', svg)]
    assert sum(widths) == pytest.approx(100, abs=0.01)
    ElementTree.fromstring(svg)


def test_reused_stage_is_hatched_and_not_only_coloured() -> None:
    plain, hatched = (
        stacked_bar([Segment(label="shard", value=1, color="red", hatched=hatched)], title="time")
        for hatched in (False, True)
    )
    assert "url(#hatch)" in hatched
    assert "url(#hatch)" not in plain


@pytest.mark.parametrize(
    ("value", "width"), [(0.612, "61.20%"), (-1.0, "0.00%"), (7.0, "100.00%"), (math.nan, "0.00%")]
)
def test_meter_is_the_share_within_its_track(value: float, width: str) -> None:
    assert f'<rect width="{width}"' in meter(value)


def test_every_chart_names_itself_and_escapes_its_labels() -> None:
    line = Series(name=HOSTILE, color=HOSTILE, points=[(0, 1.0)])
    for svg in (
        line_chart([line], title=HOSTILE, x_label=HOSTILE),
        histogram([0.0, 1.0], [1], title=HOSTILE, x_label=HOSTILE, color=HOSTILE),
        stacked_bar([Segment(label=HOSTILE, value=1, color=HOSTILE, tooltip=HOSTILE)], title=HOSTILE),
    ):
        assert "<script" not in svg
        root = ElementTree.fromstring(svg)
        assert root[0].tag == "title"
        assert root[0].text == HOSTILE
        assert root.get("role") == "img"


def test_a_heat_map_has_a_cell_a_weight_and_none_where_there_is_no_number() -> None:
    svg = heat([[0.0, 1.0, 0.5], [math.nan, 0.25]], title="<where>")
    assert 'viewBox="0 0 3 2"' in svg
    assert "&lt;where&gt;" in svg
    cells = re.findall(r'<rect x="(\d)" y="(\d)" width="1" height="1" fill-opacity="([^"]+)"/>', svg)
    assert cells == [("0", "0", "0"), ("1", "0", "0.7"), ("2", "0", "0.35"), ("1", "1", "0.175")]
