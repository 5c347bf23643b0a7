"""Building blocks of our HTML pages: templates with their filters, and figures as people write them.

A page is a single file without outside resources: it opens from an artifact store, a mail or a laptop without a
network. Captions, keys and file names are not trusted: Jinja escapes them all, and only our own SVG passes as markup.
"""

import re
from base64 import b64encode
from datetime import UTC, datetime
from functools import cache
from io import BytesIO
from pathlib import Path

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from PIL import Image, ImageOps

from mmflow.imaging.header import probe
from mmflow.report.charts import is_finite
from mmflow.sources.reasons import Rejected

MISSING = "—"
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}


@cache
def environment() -> Environment:
    """Finds templates by their file name, with the filters that all of them use.

    They include `page.css.jinja`, the one style, and import their building blocks from `page.html.jinja`.
    """
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=ChainableUndefined,  # a figure that nobody recorded prints as a dash, and does not cost the page
    )
    made.filters |= {
        "count": format_count,
        "number": format_number,
        "percent": format_percent,
        "seconds": format_seconds,
        "bytes": format_bytes,
        "date": format_date,
        "metric": format_metric,
        "words": words,
        "is_share": is_share,
    }
    return made


def format_count(value: object) -> str:
    """3953 as "3,953", 1300000 as "1.3M"."""
    if not isinstance(value, int | float) or not is_finite(value):
        return MISSING
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= scale * 0.99995:  # 999,950 of the unit below would round up to "1,000.0"
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
    """A share as "61.2%"; with two decimals below one percent."""
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


def format_date(value: object) -> str:
    """An ISO 8601 time as "Sunday 22 November 2026, 03:00 UTC"; other text unchanged."""
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    zone = "" if moment.tzinfo is None else " UTC"
    moment = moment if moment.tzinfo is None else moment.astimezone(UTC)
    return f"{moment:%A} {moment.day} {moment:%B %Y, %H:%M}{zone}"


def is_share(name: str) -> bool:
    """Whether a metric is between 0 and 1 and reads best as a percentage."""
    return bool(re.search(r"\b(R@\d+|mAP|F1|BLEU|ROUGE)|accuracy|recall|precision|share|distinct", name))


def format_metric(value: object, name: str) -> str:
    """A metric's value: R@K and accuracies as percentages, ranks with one decimal."""
    if is_share(name):
        return format_percent(value)
    if "rank" in name and isinstance(value, float) and is_finite(value):
        return f"{value:,.1f}"
    return format_count(value) if isinstance(value, int) else format_number(value)


def words(name: object) -> str:
    """A key of the report in words: "unseen_variants" as "unseen variants", directions with an arrow."""
    return DIRECTIONS.get(str(name), str(name).replace("_", " "))


def metric_words(path: str) -> str:
    """A metric's flat name in words: "languages/zh/text_to_image/R@10" as "zh text → image R@10"."""
    return " ".join(words(part) for part in path.split("/") if part != "languages")


def natural_order(metric: str) -> tuple[float, str]:
    """Sorts R@1, R@5, R@10 by their numbers, before metrics without one."""
    number = re.search(r"\d+", metric)
    return (float(number[0]) if number else float("inf"), metric)


def data_uri(image: bytes) -> str:
    """The picture as a data URI, its type read off the bytes; "" for bytes that browsers do not show."""
    kinds = ((b"\xff\xd8\xff", 0, "jpeg"), (b"\x89PNG", 0, "png"), (b"GIF8", 0, "gif"), (b"WEBP", 8, "webp"))
    kind = next((kind for magic, at, kind in kinds if image[at : at + len(magic)] == magic), None)
    return f"data:image/{kind};base64,{b64encode(image).decode()}" if kind else ""


def thumbnail(body: bytes, pixels: int) -> bytes | None:
    """A JPEG of a stored image within a square of so many pixels, upright and on white; None for bytes that cannot be
    decoded."""
    try:
        image = probe(body).image
        image.draft("RGB", (2 * pixels, 2 * pixels))
        small = ImageOps.exif_transpose(image)
        small.thumbnail((pixels, pixels))
        if small.has_transparency_data:
            layer = small.convert("RGBA")
            small = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        target = BytesIO()
        small.convert("RGB").save(target, "JPEG", quality=82)
    except (Rejected, OSError, ValueError, SyntaxError):
        return None
    return target.getvalue()
