"""One HTML page about a dataset, beside its manifest: what is in it, what it looks like, and what was kept out."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Template
from markupsafe import Markup
from PIL import Image, ImageOps

from mmflow.core.errors import CorruptArtifactError
from mmflow.core.storage import join, write_bytes
from mmflow.dataset.manifest import ShardInfo
from mmflow.dataset.opened import Dataset, open_dataset, read_sample
from mmflow.dataset.samples import read_texts
from mmflow.imaging.header import probe
from mmflow.report import charts, page
from mmflow.report.survey import ASPECTS, histogram_of, rejected_examples, shares, survey
from mmflow.sources.reasons import Rejected

PAGE = "describe.html"
THUMBNAIL_PIXELS = 160
LONGEST_CAPTION = 160  # characters of it under its picture
MAX_SOURCES = 100
# Histograms: what is counted, what its axis says.
CHARTS = {
    "side": ("shortest side", "pixels"),
    "kibibytes": ("size of the image file", "KiB"),
    "characters": ("longest caption, in characters", "characters"),
    "tokens": ("longest caption, in tokens", "tokens, estimated"),
}


def write_description(uri: str) -> str:
    """Write the page of the dataset at `uri` and return where it is. The same dataset gives the same page."""
    dataset = open_dataset(uri)
    description, pictures = describe(dataset)
    target = join(uri, PAGE)
    write_bytes(target, render(description, pictures).encode())
    return target


def describe(dataset: Dataset) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The page's figures, and the thumbnails (JPEG) of the samples that it shows, by key."""
    found = survey(dataset)
    totals = dataset.manifest["totals"]
    examples: dict[str, list[dict[str, Any]]] = {}
    pictures: dict[str, bytes] = {}
    splits = sorted(dataset.splits, key=lambda split: (-found.samples[split], split))
    for split in splits:
        examples[split] = []
        for _, shard, row in found.shown[split]:
            example, picture = show(dataset, shard, row)
            examples[split].append(example)
            if picture is not None:
                pictures[example["key"]] = picture
    rejected = rejected_examples(dataset)
    reasons = shares(totals["reasons"])
    histograms = {name: histogram_of(getattr(found, name)) for name in CHARTS}
    description = {
        "name": dataset.uri.rstrip("/").rpartition("/")[2],
        "fingerprint": dataset.fingerprint,
        "adopted": dataset.adopted,
        "totals": {name: totals[name] for name in ("records", "samples", "quarantined", "bytes")},
        "splits": {split: of_split(dataset, split) for split in splits},
        "captions": found.captions,
        "languages": shares(found.languages),
        "licenses": [{**row, "name": row["name"] or "none named"} for row in shares(found.licenses)],
        "formats": shares(found.formats),
        "aspects": shares(found.aspects, [name for name, _ in ASPECTS]),
        "clips": found.clips,
        "frames": found.frames,
        "repeated": {"pictures": found.repeated_pictures, "captions": found.repeated_captions},
        "histograms": {name: histogram for name, histogram in histograms.items() if histogram},
        "examples": examples,
        "reasons": [{**reason, "examples": rejected.get(reason["name"], [])} for reason in reasons],
        "sources": [readable(source) for source in dataset.manifest.get("sources", [])[:MAX_SOURCES]],
        "num_sources": len(dataset.manifest.get("sources", [])),
        "settings": dataset.manifest.get("settings", {}),
    }
    return description, pictures


def of_split(dataset: Dataset, split: str) -> dict[str, Any]:
    """Numbers and sizes of a split's shards; those without samples are left out of the medians."""
    shards = dataset.shards(split)
    filled = [shard for shard in shards if shard.samples] or list(shards)
    return {
        "samples": dataset.samples(split),
        "bytes": sum(shard.bytes for shard in shards),
        "shards": len(shards),
        "samples_per_shard": [each(shard.samples for shard in filled) for each in (min, statistics.median, max)],
        "bytes_per_shard": [each(shard.bytes for shard in filled) for each in (min, statistics.median, max)],
    }


def show(dataset: Dataset, shard: ShardInfo, row: int) -> tuple[dict[str, Any], bytes | None]:
    """A sample's key, captions and number of pixels, and its thumbnail; None where its bytes are no longer whole."""
    try:
        sample = read_sample(dataset, shard, row)
    except CorruptArtifactError:
        return {"key": f"{shard.name}, row {row}", "captions": [{"language": "en", "text": "damaged"}]}, None
    captions, _ = read_texts(sample["txt"].encode(), json.dumps(sample["json"]).encode())
    shown = [{**caption, "text": shorten(caption["text"])} for caption in captions[:2]]
    return {"key": sample["key"], "captions": shown, "more": len(captions) - len(shown)}, thumbnail(sample["image"])


def shorten(text: str) -> str:
    """The beginning of a long caption."""
    return text if len(text) <= LONGEST_CAPTION else text[: LONGEST_CAPTION - 1].rstrip() + "…"


def thumbnail(body: bytes) -> bytes | None:
    """A small JPEG of a stored image, upright and on white; None for what cannot be decoded."""
    try:
        image = probe(body).image
        image.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
        small = ImageOps.exif_transpose(image)
        small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        if small.has_transparency_data:
            layer = small.convert("RGBA")
            small = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        target = io.BytesIO()
        small.convert("RGB").save(target, "JPEG", quality=82)
    except (Rejected, OSError, ValueError, SyntaxError):
        return None
    return target.getvalue()


def readable(source: Mapping[str, Any]) -> dict[str, str]:
    """A line of the manifest's sources as text, hashes shortened."""
    return {
        str(name): value[:16] + "…" if isinstance(value, str) and len(value) in (32, 64) else str(value)
        for name, value in source.items()
        if isinstance(value, str | int | float)
    }


def render(description: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page as HTML text."""
    drawn = []
    for name, histogram in description["histograms"].items():
        title, unit = CHARTS[name]
        svg = charts.histogram(
            histogram["edges"], histogram["counts"], title=f"Samples by {title}", x_label=unit, color="var(--bar)"
        )
        drawn.append({**histogram, "name": name, "title": title, "unit": unit, "svg": Markup(svg)})
    return template().render(
        data=description,
        charts={each["name"]: each for each in drawn},
        settings=json.dumps(description["settings"], indent=2, ensure_ascii=False, sort_keys=True),
        picture=lambda key: page.data_uri(pictures[key]) if key in pictures else "",
        meter=lambda value, whole: Markup(charts.meter(float(value), maximum=float(whole or 1), color="var(--bar)")),
    )


@cache
def template() -> Template:
    """The page's template."""
    return page.environment().get_template("dataset_page.html.jinja")
