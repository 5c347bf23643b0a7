"""The HTML page that people read about a run: what it made, whether the model was promoted, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mmflow.report import charts
from mmflow.report.charts import Segment, Series, is_finite
from mmflow.report.page import (
    MISSING,
    data_uri,
    environment,
    format_bytes,
    format_count,
    format_metric,
    format_number,
    format_percent,
    format_seconds,
    metric_words,
    natural_order,
    words,
)

NUM_STAGE_COLORS = 7  # --stage-0 to --stage-6 in the style
MODEL_COLORS = {name: f"var(--{name})" for name in ("teacher", "student", "untrained", "chance")}
# How the training went, not what was learned: drawn after the losses.
TELEMETRY = ("learning_rate", "logit_scale", "gradient_norm", "samples_per_second")
VALIDATION = "validation/"
FINDS = {"text_to_image": "captions find their picture", "image_to_text": "pictures find their caption"}
MAPS = {"picture": "what moved the score", "rollout": "attention rollout"}
# The section `written` in the navigation and over its content, named after the first part that it has.
WRITTEN = {
    "captions": ("Writes", "What it writes"),
    "answers": ("Answers", "What it answers"),
    "confusion": ("Confuses", "What it takes for what"),
}

Report = Mapping[str, Any]


def render_report(report: Report, images: Mapping[str, bytes]) -> str:
    """The page as HTML text. `report` is the content of report.json; every section but the name may be missing.

    `images` maps a sample's key to its JPEG, PNG, GIF or WebP bytes; a key without a picture shows as an empty frame.
    """
    evaluation, written = report.get("evaluation") or {}, report.get("written") or {}
    splits, first = evaluation.get("splits") or {}, (evaluation.get("headline") or {}).get("split")
    template = environment().get_template("run_page.html.jinja")
    return template.render(
        report=report,
        headline=headline(evaluation),
        facts=facts(report),
        stages=stage_view(report.get("stages") or []),
        splits={
            name: {**splits[name], "tables": metric_tables(splits[name].get("models") or {})}
            for name in sorted(splits, key=lambda name: name != first)
        },
        curves=curve_charts(report.get("training") or {}),
        similarity=similarity_chart((report.get("scores") or {}).get("similarity") or {}),
        looks=[look_view(row) for row in (report.get("looks") or {}).get("rows") or []],
        written_titles=next((titles for part, titles in WRITTEN.items() if written.get(part)), WRITTEN["answers"]),
        confusion=confusion_view(written.get("confusion") or {}),
        picture=lambda key: data_uri(images[key]) if key in images else "",
        meter=meter,
        color=model_color,
        kept=kept_view((report.get("comparison") or {}).get("share_of_teacher") or {}),
    )


# --- sections -------------------------------------------------------------------------------------------------------


def model_color(name: str) -> str:
    """The CSS colour of a model; looked up, never built from the name, which could carry CSS."""
    return MODEL_COLORS.get(name, "var(--bar)")


def model_order(name: str) -> int:
    """Teacher, student, untrained, chance, then others."""
    return list(MODEL_COLORS).index(name) if name in MODEL_COLORS else len(MODEL_COLORS)


def meter(value: object, model: str, maximum: object = 1.0, mark: object = None) -> Markup:
    """The bar under a figure; empty where the figure, or its maximum, was not recorded."""
    number, whole, threshold = (
        float(x) if isinstance(x, int | float) and is_finite(x) else None for x in (value, maximum, mark)
    )
    return Markup(charts.meter(number or 0.0, maximum=whole or 0.0, color=model_color(model), mark=threshold))


def headline(evaluation: Report) -> dict[str, str] | None:
    """The page's first number, its sentence, and the other models' values; None if it was not measured."""
    wanted = evaluation.get("headline") or {}
    split_name, direction, metric = (str(wanted.get(key)) for key in ("split", "direction", "metric"))
    split = (evaluation.get("splits") or {}).get(split_name) or {}
    models = split.get("models") or {}
    values = {
        name: value
        for name in sorted(models, key=model_order)
        if is_finite(value := (models[name].get(direction) or {}).get(metric))
    }
    if not values:
        return None
    model = "student" if "student" in values else next(iter(values))
    recall = re.fullmatch(r"R@(\d+)", metric)
    rows = f" ({format_count(split['rows'])} rows)" if "rows" in split else ""
    finds = f"{words(metric)}, {words(direction)}"
    if recall:
        place = "first" if recall[1] == "1" else f"among the first {recall[1]}"
        finds = f"of {FINDS.get(direction, words(direction))} {place}"
    return {
        "figure": format_metric(values[model], metric),
        "sentence": f"{finds} on {words(split_name)}{rows}.",
        "detail": f"{model}, {words(direction)} {metric}",
        "against": ", ".join(f"{name} {format_metric(values[name], metric)}" for name in values if name != model),
    }


def facts(report: Report) -> list[tuple[str, str]]:
    """(figure, label) pairs for the strip under the headline; only those that the run has."""
    comparison, training = report.get("comparison") or {}, report.get("training") or {}
    wanted = (report.get("evaluation") or {}).get("headline") or {}
    strip = [
        (format_seconds(report.get("seconds")), "wall time of the loop"),
        (format_bytes(report.get("peak_memory_bytes")), "peak memory"),
        (format_count((report.get("dataset") or {}).get("samples")), "samples in the dataset"),
    ]
    teacher, student = comparison.get("teacher_parameters"), comparison.get("student_parameters")
    if is_finite(teacher) and is_finite(student):
        strip.append((f"{format_count(teacher)} → {format_count(student)}", "parameters, teacher → student"))
    metric = f"{wanted.get('direction')}/{wanted.get('metric')}"
    share = ((comparison.get("share_of_teacher") or {}).get(wanted.get("split")) or {}).get(metric)
    strip.append((format_percent(share), f"of the teacher’s {metric_words(metric)}"))
    if training:
        role = list(training)[-1]
        strip.append((format_number(training[role].get("samples_per_second")), f"samples/s, {role} training"))
    return [(figure, label) for figure, label in strip if figure != MISSING]


def stage_view(stages: Sequence[Report]) -> dict[str, Any]:
    """The stages with their colour and share of the building time, and the bar of those shares ("" if all unknown)."""
    total = sum(stage["seconds"] for stage in stages if is_finite(stage.get("seconds")))
    rows, segments = [], []
    for index, stage in enumerate(stages):
        color = f"var(--stage-{index % NUM_STAGE_COLORS})"
        share = stage["seconds"] / total if is_finite(stage.get("seconds")) and total > 0 else None
        rows.append({**stage, "color": color, "share": share})
        if share is not None:
            name, seconds, reused = str(stage["stage"]), stage["seconds"], stage.get("status") == "reused"
            text = f"{name}, {format_seconds(seconds)}, {format_percent(share)}"
            segments.append(Segment(label=name, value=seconds, color=color, tooltip=text, hatched=reused))
    title = "Share of building time: " + "; ".join(segment.tooltip for segment in segments)
    return {"rows": rows, "bar": Markup(charts.stacked_bar(segments, title=title)) if segments else ""}


def look_view(row: Report) -> Report:
    """A picture with the maps that lie over it, and its caption in pieces with a weight each, as CSS takes it."""
    maps = [
        {"name": name, "svg": Markup(charts.heat(row[key], title=f"{name}, {row.get('key')}"))}
        for key, name in MAPS.items()
        if row.get(key)
    ]
    pieces = [
        {"text": piece["text"], "weight": f"{piece['weight']:.3g}" if is_finite(piece.get("weight")) else "0"}
        for piece in row.get("tokens") or []
    ]
    return {**row, "maps": maps, "pieces": pieces}


def confusion_view(confusion: Report) -> dict[str, Any]:
    """The columns (classes, and "none" where a row has no answer), and a row per class: each cell with its share of the
    row, and the share that was right."""
    names, counts = confusion.get("classes") or [], confusion.get("counts") or []
    unanswered = any(row[-1] for row in counts)
    rows = []
    for number, (name, row) in enumerate(zip(names, counts, strict=False)):
        total = max(1, sum(row))
        shown = row if unanswered else row[:-1]
        cells = [{"count": count, "share": f"{count / total:.3g}"} for count in shown]
        rows.append({"name": name, "cells": cells, "right": row[number] / total})
    return {"columns": [*names, "none"] if unanswered else names, "rows": rows}


def metric_tables(models: Report) -> list[dict[str, Any]]:
    """A table per measurement (each direction, zero-shot, each language): title, columns, and values by model. `metric`
    is what is in all columns, or "" where each column is a metric."""
    tables: dict[tuple[str, str], dict[str, Report]] = {}
    for model in sorted(models, key=model_order):
        parts = {words(key): value for key, value in models[model].items() if key != "languages"}
        for language, directions in (models[model].get("languages") or {}).items():
            parts |= {f"{language}, {words(direction)}": value for direction, value in directions.items()}
        for name, measured in parts.items():
            for title, metric, values in _measurements(name, measured):
                tables.setdefault((title, metric), {})[model] = values
    return [
        {
            "title": title,
            "metric": metric,
            "rows": rows,
            "columns": sorted({name for values in rows.values() for name in values}, key=natural_order),
        }
        for (title, metric), rows in tables.items()
    ]


def _measurements(title: str, values: Report) -> Iterator[tuple[str, str, Report]]:
    """(title, metric, values by column). Where a measurement consists of others, such as robustness of those of each
    change, these are the columns, and each of their metrics has a table."""
    parts = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    own = {name: value for name, value in values.items() if name not in parts}
    if own or not parts:
        yield title, "", own
    if any(isinstance(value, Mapping) for part in parts.values() for value in part.values()):
        for name, part in parts.items():
            yield from _measurements(f"{title}, {words(name)}", part)
        return
    for metric in dict.fromkeys(metric for part in parts.values() for metric in part):
        columns = {name: part[metric] for name, part in parts.items() if metric in part}
        yield f"{title}, {words(metric)}", metric, columns


def kept_view(share_of_teacher: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What the student keeps of the teacher: a row per metric, text to image first and R@1 before R@5, and a column per
    split; None where a split lacks the metric."""

    def order(name: str) -> tuple[bool, str, tuple[float, str]]:
        group, _, metric = name.rpartition("/")
        return group != "text_to_image", group, natural_order(metric)

    splits = list(share_of_teacher)
    names = sorted({name for shares in share_of_teacher.values() for name in shares}, key=order)
    rows = [
        {"name": metric_words(name), "shares": [share_of_teacher[split].get(name) for split in splits]}
        for name in names
    ]
    return {"splits": splits, "rows": rows}


def curve_charts(training: Report) -> list[dict[str, Any]]:
    """A small chart per curve, losses first: all models in one chart, dashed for held-out data. `latest` holds each
    model's last values."""
    curves = {role: entry.get("curves") or {} for role, entry in training.items()}
    drawn = list(dict.fromkeys(name for entry in curves.values() for name in entry))
    names = [name for name in drawn if not name.startswith(VALIDATION) or name.removeprefix(VALIDATION) not in drawn]
    names = [name for name in names if name not in TELEMETRY] + [name for name in TELEMETRY if name in names]
    steps = [step for entry in curves.values() for points in entry.values() for step, _ in points]
    # One range of steps for all, so that the page's cursor stands at the same place in every chart.
    x_range = (min(steps), max(steps)) if steps else None
    drawn = []
    for name in names:
        series, latest = [], []
        for role, entry in curves.items():
            color, ended = model_color(role), training[role].get("stopped") or ""
            plain, held_out = entry.get(name), entry.get(VALIDATION + name)
            lines = [Series(name=role, color=color, points=plain, ended=ended)] if plain else []
            if held_out:
                lines.append(Series(name=f"{role}, held out", color=color, points=held_out, dashed=True, ended=ended))
            series += lines
            # A run that ended in NaN says so here, instead of showing its last finite value.
            values = [line.points[-1][1] for line in lines]
            last = [format_number(value) if is_finite(value) else "NaN" for value in values]
            latest += [(role, ", held out ".join(last))] if last else []
        if series:
            title = metric_words(name)
            chart = charts.line_chart(series, title=f"{title} by step", x_label="step", x_range=x_range)
            drawn.append({"name": title, "svg": Markup(chart), "latest": latest})
    return drawn


def similarity_chart(similarity: Report) -> Markup | str:
    """The histogram of image–caption similarities, or "" where none was recorded."""
    if not similarity.get("counts"):
        return ""
    title = "Samples by similarity of image and caption"
    edges, counts = similarity["edges"], similarity["counts"]
    full = [place for place, count in enumerate(counts) if count] or [0]
    edges, counts = edges[full[0] : full[-1] + 2], counts[full[0] : full[-1] + 1]
    return Markup(charts.histogram(edges, counts, color="var(--bar)", title=title, x_label="similarity"))
