"""The one HTML page that a person reads about a run: what came out, whether it was promoted, and why.

The page is a single file with no outside resource, so that it opens from an artifact store, a mail or a laptop without
a network. Captions, keys and file names are untrusted: Jinja escapes them all, and only our own SVG passes as markup.
"""

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, Template
from markupsafe import Markup

from mmflow.evaluation import charts
from mmflow.evaluation.charts import Segment, Series, is_finite

MISSING = "—"
NUM_STAGE_COLORS = 7  # --stage-0 to --stage-6 in the template
MODEL_COLORS = {name: f"var(--{name})" for name in ("teacher", "student", "untrained", "chance")}
# These describe how the training went, not what was learned; they stand after the losses.
TELEMETRY = ("learning_rate", "logit_scale", "gradient_norm", "samples_per_second")
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
FINDS = {"text_to_image": "captions find their picture", "image_to_text": "pictures find their caption"}


def format_count(value: object) -> str:
    """3953 as "3,953", 1300000 as "1.3M"."""
    if not isinstance(value, int | float) or not is_finite(value):
        return MISSING
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        # 999,950 of the next lower unit would round up to "1,000.0M".
        if abs(value) >= scale * 0.99995:
            return f"{value / scale:.1f}{suffix}"
    return f"{value:,.0f}" if value == int(value) else format_number(value)


def format_number(value: object) -> str:
    """About three significant digits: 0.0714 as "0.071", 5.24 as "5.24", 142.7 as "143"."""
    if not isinstance(value, int | float) or not is_finite(value):
        return MISSING
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    decimals = next((d for bound, d in ((100, 0), (10, 1), (1, 2), (0.001, 3)) if abs(value) >= bound), None)
    return f"{value:.2g}".replace("e-0", "e-") if decimals is None else f"{value:,.{decimals}f}"


def format_percent(value: object) -> str:
    """A share as "61.2%"; below one percent with two decimals, as there the first alone says nothing."""
    if not isinstance(value, int | float) or not is_finite(value):
        return MISSING
    if value in (0, 1):
        return f"{value:.0%}"
    return f"{value:.2%}" if abs(value) < 0.01 else f"{value:.1%}"


def format_seconds(value: object) -> str:
    """0.042 as "42 ms", 12.4 as "12.4 s", 287.3 as "4 min 47 s", 9000 as "2 h 30 min"; with no-break spaces."""
    if not isinstance(value, int | float) or not is_finite(value):
        return MISSING
    if value < 99.95:
        return f"{value:.1f}\u00a0s" if value >= 0.1 or value == 0 else f"{value * 1000:.0f}\u00a0ms"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(round(value / 60), 60) if value >= 3570 else (0, minutes)
    return f"{hours}\u00a0h {minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min {seconds:02d}\u00a0s"


def format_bytes(value: object) -> str:
    """Binary units, as Kubernetes and Ray state memory: 1300000000 as "1.2 GiB"."""
    if not isinstance(value, int | float) or not is_finite(value):
        return MISSING
    scaled, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(scaled) < 1023.95 or unit == "PiB":
            break
        scaled /= 1024
    return f"{scaled:,.0f}\u00a0{unit}" if unit == "B" else f"{scaled:,.1f}\u00a0{unit}"


def is_share(name: str) -> bool:
    """True for metrics between 0 and 1 that people read as percentages."""
    return bool(re.search(r"\bR@\d+|accuracy|recall|share", name))


def format_metric(value: object, name: str) -> str:
    """A metric's value as its name asks: R@K and accuracies as percentages, ranks with one decimal."""
    if is_share(name):
        return format_percent(value)
    if "rank" in name and isinstance(value, float) and is_finite(value):
        return f"{value:,.1f}"
    return format_count(value) if isinstance(value, int) else format_number(value)


def format_date(value: object) -> str:
    """An ISO 8601 instant as "Sunday 22 November 2026, 03:00 UTC"; text that is none comes back as it is."""
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    zone = "" if moment.tzinfo is None else " UTC"
    moment = moment if moment.tzinfo is None else moment.astimezone(UTC)
    return f"{moment:%A} {moment.day} {moment:%B %Y, %H:%M}{zone}"


def words(name: object) -> str:
    """A key of the report in a reader's words: "unseen_variants" as "unseen variants", directions with an arrow."""
    return DIRECTIONS.get(str(name), str(name).replace("_", " "))


def model_color(name: str) -> str:
    """The CSS colour of a model; looked up, never built from the name, which could carry CSS of its own."""
    return MODEL_COLORS.get(name, "var(--bar)")


def data_uri(image: bytes) -> str:
    """The picture as a data URI, its type read off the bytes; "" for bytes that are no picture a browser shows."""
    kinds = ((b"\xff\xd8\xff", 0, "jpeg"), (b"\x89PNG", 0, "png"), (b"GIF8", 0, "gif"), (b"WEBP", 8, "webp"))
    kind = next((kind for magic, at, kind in kinds if image[at : at + len(magic)] == magic), None)
    return f"data:image/{kind};base64,{b64encode(image).decode()}" if kind else ""


def headline(evaluation: Mapping[str, Any]) -> dict[str, str] | None:
    """The page's one number, the sentence that it opens, and what to hold it against; None if it was not measured."""
    wanted = evaluation.get("headline") or {}
    split_name, direction, metric = (str(wanted.get(key)) for key in ("split", "direction", "metric"))
    split = (evaluation.get("splits") or {}).get(split_name) or {}
    values = {name: (model.get(direction) or {}).get(metric) for name, model in (split.get("models") or {}).items()}
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
        (format_seconds(report.get("seconds")), "wall time of the loop"),
        (format_bytes(report.get("peak_memory_bytes")), "peak memory"),
        (format_count((report.get("dataset") or {}).get("samples")), "samples in the dataset"),
    ]
    if is_finite(teacher) and is_finite(student) and student:
        strip.append((f"{format_count(teacher)} → {format_count(student)}", "parameters, teacher → student"))
    strip += [
        (format_percent(value), f"of the teacher’s {metric}, {words(split)}")
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
    """A small chart a curve, its models drawn over each other; losses first. `latest` holds each line's last value."""
    names = list(dict.fromkeys(name for role in training.values() for name in role.get("curves") or {}))
    names = [name for name in names if name not in TELEMETRY] + [name for name in TELEMETRY if name in names]
    steps = [x for role in training.values() for points in (role.get("curves") or {}).values() for x, _ in points]
    # One range of steps for all, so that the page's cursor stands at the same place in every chart.
    x_range = (min(steps), max(steps)) if steps else None
    drawn = []
    for name in names:
        curves = {
            role: entry["curves"][name] for role, entry in training.items() if (entry.get("curves") or {}).get(name)
        }
        series = [
            Series(name=role, color=model_color(role), points=[(x, y) for x, y in points])
            for role, points in curves.items()
        ]
        if series:
            drawn.append(
                {
                    "name": words(name),
                    "svg": Markup(
                        charts.line_chart(series, title=f"{words(name)} by step", x_label="step", x_range=x_range)
                    ),
                    # A run that ended in NaN must say so here, not show its last healthy value.
                    "latest": [
                        (line.name, format_number(line.points[-1][1]) if is_finite(line.points[-1][1]) else "NaN")
                        for line in series
                    ],
                }
            )
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
        picture=lambda key: data_uri(images[key]) if key in images else "",
        meter=meter,
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
    # Chainable: a figure that a stage did not record prints as a dash, and never costs the morning's report.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=ChainableUndefined,
    )
    environment.filters |= {
        "count": format_count,
        "number": format_number,
        "percent": format_percent,
        "seconds": format_seconds,
        "bytes": format_bytes,
        "metric": format_metric,
        "date": format_date,
        "words": words,
        "is_share": is_share,
        "color": model_color,
    }
    return environment.get_template("report.html.jinja")
