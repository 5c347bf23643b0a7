"""The report is one file, lets nothing be injected, shows every figure, and has no hole where a stage did not run."""

import math
import re
from collections.abc import Iterator
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any

import pytest

from mmflow.report import page
from mmflow.report.run_page import metric_tables, render_report
from tests.report.sample_report import sample_images, sample_report

HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>'
VOID = {"meta", "img", "br"}
SECTIONS = {
    "stages": "loop",
    "retrieval": "retrieval",
    "looks": "looks",
    "written": "written",
    "training": "training",
    "dataset": "dataset",
    "promotion": "promotion",
    "scores": "scores",
    "lineage": "lineage",
}


class Page(HTMLParser):
    """What a browser would make of the page: its elements, its visible text, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def ids(self) -> set[str | None]:
        return {attrs["id"] for _, attrs in self.elements if "id" in attrs}


Place = tuple[str | int, ...]


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """(path, value) of every leaf, of lists the first three entries: the others go through the same lines."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else list(enumerate(value))[:3]
        for key, child in entries:
            yield from leaves(child, (*place, key))
    else:
        yield place, value


def changed(leaf: Any) -> Any:
    if isinstance(leaf, bool):
        return not leaf
    return f"changed {leaf}" if isinstance(leaf, str) else leaf * 1.5 + 3 if isinstance(leaf, float) else leaf * 2 + 3


def poisoned(value: Any) -> Any:
    """The report with every free text replaced by an attack; the few words that the page acts on stay."""
    if isinstance(value, dict):
        return {key: child if key in ("status", "headline") else poisoned(child) for key, child in value.items()}
    if isinstance(value, list):
        return [poisoned(child) for child in value]
    return HOSTILE if isinstance(value, str) else value


def test_page_is_well_formed_and_whole() -> None:
    parsed = Page(render_report(sample_report(), sample_images()))
    assert parsed.open == []
    order = [attrs["id"] for tag, attrs in parsed.elements if tag == "section"]
    assert order[:5] == ["loop", "retrieval", "looks", "written", "models"]
    assert order[5:] == ["training", "dataset", "promotion", "scores", "lineage", "recipe"]


def test_page_loads_nothing_from_outside() -> None:
    html = render_report(sample_report(), sample_images())
    for tag, attrs in Page(html).elements:
        assert tag not in ("link", "iframe", "object", "base")
        assert (attrs.get("src") or "data:image/").startswith("data:image/"), tag
        assert (attrs.get("href") or "#").startswith("#"), tag
    assert not re.search(r"https?://|@import", html)
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {"#hatch"}


@pytest.mark.parametrize("missing", [None, *SECTIONS])
def test_a_missing_section_leaves_no_hole_and_navigation_leads_only_to_those_there(missing: str | None) -> None:
    parsed = Page(render_report({key: value for key, value in sample_report().items() if key != missing}, {}))
    sections = {attrs["id"] for tag, attrs in parsed.elements if tag == "section"}
    assert sections == {*SECTIONS.values(), "models", "recipe"} - {SECTIONS.get(missing or "")}
    assert {attrs["href"] for tag, attrs in parsed.elements if tag == "a"} == {f"#{name}" for name in sections}


def test_report_of_a_name_alone_is_a_page_without_sections() -> None:
    parsed = Page(render_report({"name": "quickstart", "created": "2026-11-22T03:00:00+00:00", "stages": []}, {}))
    assert not [tag for tag, _ in parsed.elements if tag in ("section", "table", "figure", "dl", "a")]
    assert "quickstart · Sunday 22 November 2026, 03:00 UTC" in parsed.text


@pytest.mark.parametrize("section", sorted({*SECTIONS, "evaluation", "comparison", "machine"} - {"stages", "lineage"}))
def test_an_empty_section_does_not_cost_the_report(section: str) -> None:
    report = sample_report()
    for key in list(report[section]):
        partial = deepcopy(report)
        del partial[section][key]
        assert Page(render_report(partial, {})).open == []
    assert Page(render_report({**report, section: {}}, {})).open == []


def test_hostile_text_stays_text() -> None:
    report = poisoned(sample_report())
    report["training"][HOSTILE] = report["training"]["student"]
    report["evaluation"]["splits"][HOSTILE] = report["evaluation"]["splits"]["unseen_variants"]
    parsed = Page(render_report(report, {HOSTILE: b"no picture", **sample_images()}))
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert not [attrs for _, attrs in parsed.elements if any(name.startswith("on") for name in attrs)]
    assert all((attrs.get("src") or "data:").startswith("data:") for _, attrs in parsed.elements)
    assert not [attrs for _, attrs in parsed.elements if "evil" in (attrs.get("style") or "")]
    assert "<script>alert(1)</script>" in parsed.text


def test_only_the_beginning_of_a_long_caption_is_shown() -> None:
    report = sample_report()
    section = "Options " + "of a dialog " * 400
    report["retrieval"]["queries"][0]["caption"] = section
    report["dataset"]["examples"][0]["captions"][0]["text"] = section
    spans = re.findall(r"<(q|span)[^>]*>(Options[^<]*)</", render_report(report, {}))
    assert [tag for tag, _ in spans] == ["q", "span"]
    assert all(150 < len(text) <= 200 and text.endswith("…") for _, text in spans)


def test_every_leaf_of_the_report_shows_on_the_page() -> None:
    report = sample_report()
    before = render_report(report, {})
    silent = []
    for place, leaf in leaves(report):
        *parents, last = place
        holder: Any = report
        for key in parents:
            holder = holder[key]
        holder[last] = changed(leaf)
        if render_report(report, {}) == before:
            silent.append(place)
        holder[last] = leaf
    # A query's own picture is drawn apart only when it is not among the five found. Scores name pictures, here missing.
    assert [place for place in silent if place[-1] != "picture"] == [
        ("retrieval", "queries", number, "key") for number in range(3)
    ]


def test_headline_is_the_student_beside_the_others() -> None:
    text = Page(render_report(sample_report(), {})).text
    assert "66.2% of captions find their picture first on unseen variants (400 rows)." in text
    assert "student, text → image R@1; teacher 68.3%, untrained 0.40%, chance 0.25%" in text
    assert "✓ Promoted. openmoji-dual-encoder version 3 is the new champion, after version 2." in text


def test_headline_is_the_teacher_where_there_is_no_student_whatever_the_order_of_the_models() -> None:
    report = sample_report()
    models = report["evaluation"]["splits"]["unseen_variants"]["models"]
    del models["student"]
    report["evaluation"]["splits"]["unseen_variants"]["models"] = dict(sorted(models.items()))
    text = Page(render_report(report, {})).text
    assert "68.3% of captions find their picture first on unseen variants (400 rows)." in text
    assert "teacher, text → image R@1; untrained 0.40%, chance 0.25%" in text


def test_rows_that_failed_are_counted_beside_those_that_did_not() -> None:
    report = sample_report()
    report["evaluation"]["splits"]["unseen_variants"]["left_out"] = 3
    text = Page(render_report(report, {})).text
    assert "400 rows; 3 failed and are left out" in text
    assert text.count("failed and are left out") == 1


def test_measurements_of_measurements_have_a_table_for_each_of_their_metrics() -> None:
    student = {
        "robustness": {
            "jpeg": {"R@1": 0.51, "R@1_drop": 0.12, "rows": 400.0},
            "missing_picture": {"accuracy": 0.93, "rows": 400.0},
        },
        "slices": {"tokens": {"9-16": {"R@10": 0.5, "rows": 30.0}, "0-8": {"R@10": 0.7, "rows": 370.0}}},
    }
    tables = metric_tables({"student": student, "teacher": {"robustness": {"jpeg": {"R@1": 0.6}}}})
    assert [(table["title"], table["columns"]) for table in tables] == [
        ("robustness, R@1", ["jpeg"]),
        ("robustness, R@1 drop", ["jpeg"]),
        ("robustness, rows", ["jpeg", "missing_picture"]),
        ("robustness, accuracy", ["missing_picture"]),
        ("slices, tokens, R@10", ["0-8", "9-16"]),
        ("slices, tokens, rows", ["0-8", "9-16"]),
    ]
    report = sample_report()
    report["evaluation"]["splits"]["unseen_variants"]["models"]["student"] |= student
    text = Page(render_report(report, {})).text
    assert "robustness, R@1 drop jpeg student 12.0%" in text
    assert "robustness, accuracy missing picture student 93.0%" in text
    assert "slices, tokens, R@10 0-8 9-16 student 70.0% 50.0%" in text


def test_refusal_names_its_reason_beside_the_headline() -> None:
    report = sample_report()
    report["promotion"] |= {"decision": "refused", "reasons": ["R@1 is 66.2%, the champion has 71.3%"]}
    text = Page(render_report(report, {})).text
    assert "✗ Refused. openmoji-dual-encoder version 3 was not promoted; version 2 stays champion. R@1 is 66.2%" in text


def test_first_promotion_mentions_no_earlier_version() -> None:
    report = sample_report()
    report["promotion"]["champion_before"] = None
    assert "is the new champion." in re.sub(r"\s+\.", ".", Page(render_report(report, {})).text)


def test_right_pictures_are_marked_by_a_sign_and_not_only_by_colour() -> None:
    report = sample_report()
    report["retrieval"]["queries"] = report["retrieval"]["queries"][5:7]  # rank 17, then rank 1
    del report["written"]  # which has signs of its own
    text = Page(render_report(report, sample_images())).text
    missed, found = text[text.index("✗ right one at rank 17") :].split("✓ first", 1)
    assert "✓" not in missed
    assert found.count("✓") == 1 + text[text.index("Teacher, student, floor") :].count("✓")


def test_pictures_are_inlined_with_their_own_type_and_unknown_ones_show_their_key() -> None:
    images = sample_images()
    red, green = images["red-circle"], images["green-circle"]
    assert page.data_uri(red).startswith("data:image/jpeg;base64,")
    assert page.data_uri(green).startswith("data:image/png")
    assert page.data_uri(b"<svg onload=alert(1)>") == ""
    parsed = Page(render_report(sample_report(), {"red-circle": red}))
    assert {attrs["alt"] for tag, attrs in parsed.elements if tag == "img"} == {
        "red circle",
        "the red circle",
        "a red-circle",
        "what is a red-circle?",
    }
    assert "green-circle" in parsed.text


def test_loss_that_ended_in_nan_says_so() -> None:
    report = sample_report()
    report["training"] = {"teacher": {"stage": "pretrain", "curves": {"loss": [[0, 5.0], [10, 4.0], [20, math.nan]]}}}
    text = Page(render_report(report, {})).text
    assert re.search(r"loss\s+teacher NaN", text)


def test_a_validation_is_drawn_over_its_training_curve_and_its_end_is_marked() -> None:
    report = sample_report()
    curves = {
        "loss": [[0, 5.0], [10, 4.0], [20, 3.0]],
        "validation/loss": [[10, 4.5], [20, 4.75]],
        "validation/text_to_image/R@1": [[10, 0.5], [20, 0.25]],
    }
    report["training"] = {"teacher": {"stage": "pretrain", "stopped": "no better <loss>", "curves": curves}}
    parsed = Page(render_report(report, {}))
    drawn = [attrs for tag, attrs in parsed.elements if (attrs.get("class") or "") == "series"]
    assert [(attrs["data-name"], attrs["data-points"]) for attrs in drawn] == [
        ("teacher", "0,5;10,4;20,3"),
        ("teacher, held out", "10,4.5;20,4.75"),
        ("teacher", "10,0.5;20,0.25"),
    ]
    assert ["dasharray" in attrs["style"] for attrs in drawn] == [False, True, False]
    assert re.search(r"loss\s+teacher 3(\.0+)?, held out 4\.75", parsed.text)
    assert "validation text → image R@1" in parsed.text
    assert parsed.text.count("no better <loss>") == 3


def test_maps_lie_over_their_picture_and_weigh_the_captions_pieces() -> None:
    report = sample_report()
    report["looks"]["rows"] = report["looks"]["rows"][:1]
    report["looks"]["rows"][0] |= {"picture": [[0.0, 0.5], [1.0, math.nan]], "rollout": None}
    parsed = Page(render_report(report, sample_images()))
    cells = {
        (attrs["x"], attrs["y"]): attrs["fill-opacity"] for tag, attrs in parsed.elements if "fill-opacity" in attrs
    }
    assert cells == {("0", "0"): "0", ("1", "0"): "0.35", ("0", "1"): "0.7"}
    pieces = [
        attrs["style"] for tag, attrs in parsed.elements if tag == "span" and "--weight" in (attrs.get("style") or "")
    ]
    assert pieces == ["--weight: 0.9", "--weight: 0.35"]
    assert "what moved the score" in parsed.text
    assert "attention rollout" not in parsed.text


def test_confusions_are_shares_of_their_row_and_no_answer_is_a_column_where_it_occurs() -> None:
    report = sample_report()
    parsed = Page(render_report(report, {}))
    assert re.search(r"is, taken for circle square none right circle 7 2 1 70.0% square 3 5 0 62.5%", parsed.text)
    shares = [attrs["style"] for tag, attrs in parsed.elements if tag == "td" and attrs.get("style")]
    assert shares == [f"--weight: {share}" for share in ("0.7", "0.2", "0.1", "0.375", "0.625", "0")]
    report["written"]["confusion"]["counts"] = [[7, 2, 0], [3, 5, 0]]
    assert "none" not in Page(render_report(report, {})).text[: parsed.text.index("Teacher, student")]


def test_the_written_section_is_named_after_what_it_has() -> None:
    report = sample_report()
    for part, title in (("captions", "What it writes"), ("answers", "What it answers"), ("confusion", "What it takes")):
        assert title in Page(render_report(report, {})).text
        del report["written"][part]


def test_missing_figure_prints_as_a_dash() -> None:
    report = sample_report()
    report["evaluation"]["splits"]["unseen_variants"]["models"]["student"]["text_to_image"]["R@1"] = math.nan
    html = render_report(report, {})
    assert "nan" not in Page(html).text.lower().split()
    assert page.MISSING in html


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (page.format_count(3953), "3,953"),
        (page.format_count(1_300_000), "1.3M"),
        (page.format_count(999_960), "1.0M"),
        (page.format_count(True), "—"),
        (page.format_percent(0.612), "61.2%"),
        (page.format_percent(0.0025), "0.25%"),
        (page.format_percent(1), "100%"),
        (page.format_percent(None), "—"),
        (page.format_seconds(12.4), "12.4 s"),
        (page.format_seconds(0.042), "42 ms"),
        (page.format_seconds(287.3), "4 min 47 s"),
        (page.format_seconds(3599.6), "1 h 00 min"),
        (page.format_seconds(9000), "2 h 30 min"),
        (page.format_seconds(99.97), "1 min 40 s"),
        (page.format_bytes(900), "900 B"),
        (page.format_bytes(1_300_000_000), "1.2 GiB"),
        (page.format_number(5.238), "5.24"),
        (page.format_number(3e-7), "3e-7"),
        (page.format_metric(5.23, "mean_rank"), "5.2"),
        (page.format_metric(0.66, "unseen_variants R@1 >= champion"), "66.0%"),
        (page.format_date("not a date"), "not a date"),
        (page.format_date("2026-11-22T04:00:00+01:00"), "Sunday 22 November 2026, 03:00 UTC"),
    ],
)
def test_figures_read_as_people_write_them(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected
