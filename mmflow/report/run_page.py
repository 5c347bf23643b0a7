"""The one HTML page that a person reads about a run: what came out, whether it was promoted, and why.

It is a page as `mmflow.report.page` has them; here is what the run's figures become on it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Template
from markupsafe import Markup

from mmflow.report import charts, page
from mmflow.report.charts import Segment, Series, is_finite
from mmflow.report.page import (
    MISSING,
    data_uri,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_seconds,
)

NUM_STAGE_COLORS = 7  # --stage-0 to --stage-6 in the template
MODEL_COLORS = {name: f"var(--{name})" for name in ("teacher", "student", "untrained", "chance")}
# These describe how the training went, not what was learned; they stand after the losses.
TELEMETRY = ("learning_rate", "logit_scale", "gradient_norm", "samples_per_second")
VALIDATION = "validation/"
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
LOOKS = {"picture": "what moved the score", "rollout": "attention rollout"}
# What a section of `written` is called, by the first of its parts that is there: in the navigation, and over it.
WRITTEN = {
    "captions": ("Writes", "What it writes"),
    "answers": ("Answers", "What it answers"),
    "confusion": ("Confuses", "What it takes for what"),
}
FINDS = {"text_to_image": "captions find their picture", "image_to_text": "pictures find their caption"}


def is_share(name: str) -> bool:
    """True for metrics between 0 and 1 that people read as percentages."""
    return bool(re.search(r"\b(R@\d+|mAP|F1|BLEU|ROUGE)|accuracy|recall|precision|share|distinct", name))


def format_metric(value: object, name: str) -> str:
    """A metric's value as its name asks: R@K and accuracies as percentages, ranks with one decimal."""
    if is_share(name):
        return format_percent(value)
    if "rank" in name and isinstance(value, float) and is_finite(value):
        return f"{value:,.1f}"
    return format_count(value) if isinstance(value, int) else format_number(value)


def words(name: object) -> str:
    """A key of the report in a reader's words: "unseen_variants" as "unseen variants", directions with an arrow."""
    return DIRECTIONS.get(str(name), str(name).replace("_", " "))


def metric_words(path: str) -> str:
    """A metric's flat name in a reader's words: "zh/text_to_image/R@10" as "zh text → image R@10"."""
    return " ".join(words(part) for part in path.split("/") if part != "languages")


def kept_view(share_of_teacher: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What the student keeps of the teacher, a row a metric and a column a split; a metric that a split lacks is None
    there."""
    metrics = dict.fromkeys(metric for shares in share_of_teacher.values() for metric in shares)
    return {
        "splits": list(share_of_teacher),
        "rows": [
            {"name": metric_words(metric), "shares": [shares.get(metric) for shares in share_of_teacher.values()]}
            for metric in metrics
        ],
    }


def model_color(name: str) -> str:
    """The CSS colour of a model; looked up, never built from the name, which could carry CSS of its own."""
    return MODEL_COLORS.get(name, "var(--bar)")


def headline(evaluation: Mapping[str, Any]) -> dict[str, str] | None:
    """The page's one number, the sentence that it opens, and what to hold it against; None if it was not measured."""
    wanted = evaluation.get("headline") or {}
    split_name, direction, metric = (str(wanted.get(key)) for key in ("split", "direction", "metric"))
    split = (evaluation.get("splits") or {}).get(split_name) or {}
    models = sorted((split.get("models") or {}).items(), key=lambda each: rank_of_model(each[0]))
    values = {name: (model.get(direction) or {}).get(metric) for name, model in models}
    values = {name: value for name, value in values.items() if is_finite(value)}
    if not values:
        return None
    model = "student" if "student" in values else next(iter(values))
    recall = re.fullmatch(r"R@(\d+)", metric)
    place = "first" if recall and recall[1] == "1" else f"among the first {recall[1]}" if recall else ""
    rows = f" ({format_count(split['rows'])} rows)" if "rows" in split else ""
    finds = f"of {FINDS.get(direction, words(direction))} {place}" if recall else f"{words(metric)}, {words(direction)}"
    others = [f"{name} {format_metric(value, metric)}" for name, value in values.items() if name != model]
    return {
        "figure": format_metric(values[model], metric),
        "sentence": f"{finds} on {words(split_name)}{rows}.",
        "detail": f"{model}, {words(direction)} {metric}",
        "against": ", ".join(others),
    }


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, label) pairs for the strip under the headline; only those that the run has."""
    comparison, training = report.get("comparison") or {}, report.get("training") or {}
    teacher, student = comparison.get("teacher_parameters"), comparison.get("student_parameters")
    strip = [
        (format_seconds(report.get("seconds")), "time of all stages"),
        (format_bytes(report.get("peak_memory_bytes")), "peak memory"),
        (format_count((report.get("dataset") or {}).get("samples")), "samples in the dataset"),
    ]
    if is_finite(teacher) and is_finite(student) and student:
        strip.append((f"{format_count(teacher)} → {format_count(student)}", "parameters, teacher → student"))
    strip += [
        (format_percent(value), f"of the teacher’s {metric_words(metric)}, {words(split)}")
        for split, shares in list((comparison.get("share_of_teacher") or {}).items())[:1]
        for metric, value in list(shares.items())[:1]
    ]
    strip += [
        (format_number(training[role].get("samples_per_second")), f"samples/s, {role} training")
        for role in list(training)[-1:]
    ]
    return [(figure, label) for figure, label in strip if figure != MISSING]


def rank_of_model(model: str) -> int:
    """Teacher, student, untrained, chance; then whatever else there is, in the order given."""
    known = list(MODEL_COLORS)
    return known.index(model) if model in known else len(known)


def natural_order(metric: str) -> tuple[float, str]:
    """Sorts R@1, R@5, R@10 as people count, before what has no number in its name."""
    number = re.search(r"\d+", metric)
    return (float(number[0]) if number else float("inf"), metric)


def metric_tables(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table a measurement (each direction, zero-shot, each language): title, metric names, and values by model."""
    tables: dict[str, dict[str, Mapping[str, Any]]] = {}
    for model, measured in sorted(models.items(), key=lambda each: rank_of_model(each[0])):
        parts = {words(key): value for key, value in measured.items() if key != "languages"}
        for language, directions in (measured.get("languages") or {}).items():
            parts |= {f"{language}, {words(direction)}": value for direction, value in directions.items()}
        for title, values in parts.items():
            # A bare number beside the groups (say, a model's latency) is a table of one figure.
            tables.setdefault(title, {})[model] = values if isinstance(values, Mapping) else {title: values}
    return [
        {
            "title": title,
            "rows": rows,
            "metrics": sorted({name for row in rows.values() for name in row}, key=natural_order),
        }
        for title, rows in tables.items()
    ]


def curve_charts(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A small chart a curve, its models drawn over each other and what validations found over that, dashed; losses
    first. `latest` holds each model's last values."""
    found = list(dict.fromkeys(name for role in training.values() for name in role.get("curves") or {}))
    names = [name for name in found if not name.startswith(VALIDATION) or name.removeprefix(VALIDATION) not in found]
    names = [name for name in names if name not in TELEMETRY] + [name for name in TELEMETRY if name in names]
    steps = [x for role in training.values() for points in (role.get("curves") or {}).values() for x, _ in points]
    # One range of steps for all, so that the page's cursor stands at the same place in every chart.
    x_range = (min(steps), max(steps)) if steps else None
    drawn = []
    for name in names:
        series, latest = [], []
        for role, entry in training.items():
            lines = [
                Series(
                    name=f"{role}{kind}",
                    color=model_color(role),
                    points=[(x, y) for x, y in points],
                    dashed=bool(kind),
                    ended=entry.get("stopped") or "",
                )
                for kind, path in (("", name), (", held out", VALIDATION + name))
                if (points := (entry.get("curves") or {}).get(path))
            ]
            series += lines
            # A run that ended in NaN must say so here, not show its last healthy value.
            values = [line.points[-1][1] for line in lines]
            told = [format_number(value) if is_finite(value) else "NaN" for value in values]
            latest += [(role, ", held out ".join(told))] if told else []
        if series:
            title = metric_words(name)
            chart = charts.line_chart(series, title=f"{title} by step", x_label="step", x_range=x_range)
            drawn.append({"name": title, "svg": Markup(chart), "latest": latest})
    return drawn


def stage_view(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The stages with their colour and share of the building time, and the bar of those shares ("" if all unknown)."""
    total = sum(stage["seconds"] for stage in stages if is_finite(stage.get("seconds")))
    rows, segments = [], []
    for index, stage in enumerate(stages):
        color = f"var(--stage-{index % NUM_STAGE_COLORS})"
        known = is_finite(stage.get("seconds")) and total > 0
        rows.append({**stage, "color": color, "share": stage["seconds"] / total if known else None})
        if known:
            text = f"{stage['stage']}, {format_seconds(stage['seconds'])}, {format_percent(stage['seconds'] / total)}"
            segments.append(
                Segment(
                    label=str(stage["stage"]),
                    value=stage["seconds"],
                    color=color,
                    tooltip=text,
                    hatched=stage.get("status") == "reused",
                )
            )
    title = "Share of building time: " + "; ".join(segment.tooltip for segment in segments)
    return {"rows": rows, "bar": Markup(charts.stacked_bar(segments, title=title)) if segments else ""}


def look_view(looks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pictures with the maps laid over them, and captions in pieces with a weight each, as CSS takes it."""
    drawn = []
    for row in looks.get("rows") or []:
        maps = [
            {"name": name, "svg": Markup(charts.heat(row[key], title=f"{name}, {row.get('key')}"))}
            for key, name in LOOKS.items()
            if row.get(key)
        ]
        pieces = [
            {"text": piece["text"], "weight": f"{piece['weight']:.3g}" if is_finite(piece.get("weight")) else "0"}
            for piece in row.get("tokens") or []
        ]
        drawn.append({**row, "maps": maps, "pieces": pieces})
    return drawn


def written_titles(written: Mapping[str, Any]) -> tuple[str, str]:
    """What the section is called in the navigation, and what stands over it."""
    return next((titles for part, titles in WRITTEN.items() if written.get(part)), WRITTEN["answers"])


def confusion_view(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """The columns (classes, and none of them where that was answered), a row a class, each cell's share of it, and the
    share that was right."""
    names, counts = confusion.get("classes") or [], confusion.get("counts") or []
    unanswered = any(row[-1] for row in counts)
    return {
        "columns": [*names, "none"] if unanswered else names,
        "rows": [
            {
                "name": name,
                "cells": [
                    {"count": count, "share": f"{count / max(1, sum(row)):.3g}"}
                    for count in (row if unanswered else row[:-1])
                ],
                "right": row[number] / max(1, sum(row)),
            }
            for number, (name, row) in enumerate(zip(names, counts, strict=False))
        ],
    }


def similarity_chart(scores: Mapping[str, Any]) -> Markup | str:
    """The histogram of image–caption similarities, or "" where none was recorded."""
    similarity = scores.get("similarity") or {}
    if not similarity.get("counts"):
        return ""
    return Markup(
        charts.histogram(
            similarity["edges"],
            similarity["counts"],
            color="var(--bar)",
            title="Samples by similarity of image and caption",
            x_label="similarity",
        )
    )


def render_report(report: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The whole page as HTML text. `report` is the content of report.json; every section but the name may be absent.

    `images` maps a sample's key to its JPEG, PNG, GIF or WebP bytes; a key without a picture shows as an empty frame.
    """
    evaluation = report.get("evaluation") or {}
    splits = evaluation.get("splits") or {}
    first = (evaluation.get("headline") or {}).get("split")
    return page_template().render(
        report=report,
        headline=headline(evaluation),
        facts=facts(report),
        stages=stage_view(report.get("stages") or []),
        splits={
            name: {**splits[name], "tables": metric_tables(splits[name].get("models") or {})}
            for name in sorted(splits, key=lambda name: name != first)
        },
        curves=curve_charts(report.get("training") or {}),
        similarity=similarity_chart(report.get("scores") or {}),
        looks=look_view(report.get("looks") or {}),
        written_titles=written_titles(report.get("written") or {}),
        confusion=confusion_view((report.get("written") or {}).get("confusion") or {}),
        picture=lambda key: data_uri(images[key]) if key in images else "",
        meter=meter,
        kept=kept_view((report.get("comparison") or {}).get("share_of_teacher") or {}),
    )


def meter(value: object, model: str, maximum: object = 1.0, mark: object = None) -> Markup:
    """The bar under a figure; empty where the figure, or what it is a part of, was not recorded."""
    number, whole, threshold = (
        float(x) if isinstance(x, int | float) and is_finite(x) else None for x in (value, maximum, mark)
    )
    return Markup(charts.meter(number or 0.0, maximum=whole or 0.0, color=model_color(model), mark=threshold))


@cache
def page_template() -> Template:
    """The page's template with its filters."""
    environment = page.environment()
    environment.filters |= {"metric": format_metric, "words": words, "is_share": is_share, "color": model_color}
    return environment.get_template("run_page.html.jinja")
