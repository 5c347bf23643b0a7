"""The benchmarks' page: figures readable, goals judged, and a subject measured again leaves the others alone."""

from __future__ import annotations

import pytest

from tests.benchmarks.table import HEAD, Row, bounded, faster, merge, number, section, sections


def test_figures_keep_three_digits() -> None:
    values = [0, 0.01234, 0.5, 1.5, 59.96, 152.4, 1234567.0]
    assert [number(value) for value in values] == ["0", "0.0123", "0.500", "1.50", "60.0", "152", "1,234,567"]


def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians() -> None:
    row = faster("shards", [10, 30, 20], "peer", [5, 5, 1], goal=3, note="why")
    assert row == Row(name="shards", ours=20, unit="samples/s", peer="peer", theirs=5, ratio=6, goal="≥ 3×", met=True,
                      note="why")  # fmt: skip
    assert row.cells() == ["shards", "20.0", "peer", "5.00", "samples/s", "6.00×", "≥ 3× ✓", "why"]
    assert faster("shards", [1], "peer", [2], goal=0.85).cells()[5:7] == ["0.50×", "≥ 0.85× ✗"]
    assert faster("shards", [50], "peer", [2]).cells()[5:7] == ["25.0×", ""]


def test_rounds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        faster("shards", [1, 2], "peer", [1])


def test_a_bound_is_strict() -> None:
    row = bounded("search", [61, 20, 59], unit="s", most=60)
    assert row.cells() == ["search", "59.0", "", "", "s", "", "< 60 ✓", ""]
    assert bounded("search", [60], unit="s", most=60).met is False


def test_a_section_is_a_table_whose_cells_cannot_break_it() -> None:
    lines = section("tars", [Row(name="a|b", ours=1, unit="s")], "made so").splitlines()
    assert lines[0] == "## tars"
    assert lines[4] == "| a/b | 1.00 |  |  | s |  |  |  |"
    assert [line.count("|") for line in lines[2:5]] == [9, 9, 9]
    assert lines[-1] == "made so"


def test_only_the_subjects_measured_again_change() -> None:
    row = Row(name="n", ours=1, unit="s")
    page = merge("", {"tars": section("tars", [row], "first"), "build": section("build", [row], "first")})
    assert page.startswith(HEAD)
    assert list(sections(page)) == ["build", "tars"]
    again = merge(page, {"memory": section("memory", [row], "second"), "tars": section("tars", [row], "second")})
    assert list(sections(again)) == ["build", "memory", "tars"]
    assert [part.strip().splitlines()[-1] for part in sections(again).values()] == ["first", "second", "second"]
    assert sections(again)["build"] == sections(page)["build"]
    assert merge(again, {}) == again
