"""The page that people read about a dataset: what is in it, how it looks, where it came from, what was rejected.

Figures come from the indexes and the quarantine, a shard at a time. Memory does not grow with the samples: lengths and
sizes are counted by value, and only the few rows that are shown are kept. Repeated pictures and captions are counted
with 8 bytes a sample, at most 1 GiB.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup
from numpy.typing import NDArray

from mmflow.core.errors import CorruptArtifactError
from mmflow.core.storage import filesystem, join, write_bytes
from mmflow.dataset.format import ShardInfo, index_uri, quarantine_files, read_column
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Reader
from mmflow.dataset.verify import KEYS_PER_PASS, count_repeats, hash_texts
from mmflow.report import charts, page

PAGE = "describe.html"
THUMBNAIL_PIXELS = 160
LONGEST_CAPTION = 160  # characters shown of it
SHOWN_PER_SPLIT = 24
EXAMPLES_PER_REASON = 3
LONGEST_DETAIL = 300
MAX_SOURCES = 100
MAX_NAMES = 40  # rows of a table of languages or licences
MAX_VALUE = 20_000  # pixels, characters, tokens, KiB; larger values are counted as this
BINS = 32
TAIL = 0.995  # share of the samples in a histogram's bins; one caption of 20,000 characters would flatten it
# Histogram → its title and the name of its axis.
CHARTS = {
    "side": ("shortest side", "pixels"),
    "kibibytes": ("size of the image file", "KiB"),
    "characters": ("longest caption, in characters", "characters"),
    "tokens": ("longest caption, in tokens", "tokens, estimated"),
}
# Width over height, up to and including.
ASPECTS = (
    ("taller than 1:2", 0.5),
    ("1:2 to 4:5", 0.8),
    ("about square, 4:5 to 5:4", 1.25),
    ("5:4 to 2:1", 2.0),
    ("wider than 2:1", float("inf")),
)

Counts = NDArray[np.int64]  # (MAX_VALUE + 1,): how often each value occurs


def write_description(uri: str) -> str:
    """Write the page of the dataset at `uri` and return its URI. The same dataset gives the same page."""
    target = join(uri, PAGE)
    write_bytes(target, render(*describe(open_dataset(uri))).encode())
    return target


def describe(dataset: Dataset) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The page's figures, and the thumbnails (JPEG) of the samples that it shows, by key."""
    counted = survey(dataset)
    manifest, totals = dataset.manifest, dataset.manifest["totals"]
    examples: dict[str, list[dict[str, Any]]] = {}
    pictures: dict[str, bytes] = {}
    for split in sorted(dataset.splits, key=lambda split: (-counted.samples[split], split)):
        reader = Reader(dataset, split, frames=False)
        shown = [show(reader, shard, row) for _, shard, row in counted.shown[split]]
        examples[split] = [example for example, _ in shown]
        pictures |= {example["key"]: picture for example, picture in shown if picture is not None}
    rejected = rejected_examples(dataset)
    histograms = {name: histogram_of(counts) for name, counts in counted.values.items()}
    description = {
        "name": dataset.uri.rstrip("/").rpartition("/")[2],
        "fingerprint": dataset.fingerprint,
        "adopted": dataset.adopted,
        "totals": {name: totals[name] for name in ("records", "samples", "quarantined", "bytes")},
        "splits": {split: describe_split(dataset, split) for split in examples},
        "captions": counted.captions,
        "languages": shares(counted.languages),
        "licenses": [{**row, "name": row["name"] or "none named"} for row in shares(counted.licenses)],
        "formats": shares(counted.formats),
        "aspects": shares(counted.aspects, [name for name, _ in ASPECTS]),
        "clips": counted.clips,
        "frames": counted.frames,
        "repeated": {"pictures": counted.repeated_pictures, "captions": counted.repeated_captions},
        "histograms": {name: histogram for name, histogram in histograms.items() if histogram},
        "examples": examples,
        "reasons": [{**row, "examples": rejected.get(row["name"], [])} for row in shares(totals["reasons"])],
        "sources": [readable(source) for source in manifest.get("sources", [])[:MAX_SOURCES]],
        "num_sources": len(manifest.get("sources", [])),
        "settings": manifest.get("settings", {}),
    }
    return description, pictures


def render(description: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page as HTML text."""
    drawn = {}
    for name, histogram in description["histograms"].items():
        title, unit = CHARTS[name]
        edges, counts = histogram["edges"], histogram["counts"]
        svg = charts.histogram(edges, counts, title=f"Samples by {title}", x_label=unit, color="var(--bar)")
        drawn[name] = {**histogram, "title": title, "svg": Markup(svg)}
    template = page.environment().get_template("dataset_page.html.jinja")
    return template.render(
        data=description,
        charts=drawn,
        settings=json.dumps(description["settings"], indent=2, ensure_ascii=False, sort_keys=True),
        picture=lambda key: page.data_uri(pictures[key]) if key in pictures else "",
        meter=lambda value, whole: Markup(charts.meter(float(value), maximum=float(whole or 1), color="var(--bar)")),
    )


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """Counts over all samples. `shown` holds, per split, (hash of the key, shard, row) of the least hashes."""

    samples: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    aspects: Counter[str] = field(default_factory=Counter)
    clips: int = 0
    frames: int = 0
    captions: int = 0
    repeated_pictures: int | None = None
    repeated_captions: int | None = None
    values: dict[str, Counts] = field(default_factory=dict)  # by the names of CHARTS
    shown: dict[str, list[tuple[int, ShardInfo, int]]] = field(default_factory=dict)


def survey(dataset: Dataset) -> Survey:
    """Count every shard. Raises CorruptArtifactError for a file that is not an index."""
    counted = Survey()
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    for shard in shards:
        counted.samples[shard.split] += shard.samples
        counted.shown.setdefault(shard.split, [])
        if shard.samples:
            _add_shard(counted, shard, dataset.index(shard))
    if not dataset.adopted:  # an adopted dataset has no such hashes
        indexes = [index_uri(dataset.uri, shard.name) for shard in shards]
        counted.repeated_pictures = _repeats(indexes, "pixel_hash", counted.samples.total())
        counted.repeated_captions = _repeats(indexes, "caption_hashes", counted.captions)
    return counted


def _repeats(indexes: Sequence[str], column: str, num_values: int) -> int:
    """How many hashes of a column of the indexes (lists of them, or single ones) came before."""

    def hashes_of(shard: int) -> NDArray[np.uint64]:
        values = read_column(indexes[shard], column)
        if pa.types.is_list(values.type):
            values = values.flatten()
        return np.asarray(values.drop_null(), np.uint64)

    return count_repeats(hashes_of, len(indexes), num_passes=max(1, -(-num_values // KEYS_PER_PASS)))


def _add_shard(counted: Survey, shard: ShardInfo, index: pa.Table) -> None:
    for counter, values in (
        (counted.languages, pc.list_flatten(index["languages"])),
        (counted.licenses, index["license"].fill_null("")),
        (counted.formats, index["image_extension"]),
    ):
        for entry in pc.value_counts(values).to_pylist():
            counter[str(entry["values"])] += entry["counts"]
    counted.captions += len(pc.list_flatten(index["languages"]))
    num_frames = pc.fill_null(pc.list_value_length(index["frames"]), 0).to_numpy()
    counted.clips += int((num_frames > 0).sum())
    counted.frames += int(num_frames.sum()) + int((num_frames > 0).sum())
    width, height = index["width"].to_numpy(), index["height"].to_numpy()
    columns = {
        "side": np.minimum(width, height),
        "kibibytes": index["image_bytes"].to_numpy() // 1024,
        "characters": index["caption_characters"].drop_null().to_numpy(),
        "tokens": index["caption_tokens"].drop_null().to_numpy(),
    }
    for name, column in columns.items():
        counts = np.bincount(np.clip(column, 0, MAX_VALUE), minlength=MAX_VALUE + 1)
        counted.values[name] = counted.values.get(name, 0) + counts
    aspects = np.searchsorted([bound for _, bound in ASPECTS], width / height)
    for (name, _), number in zip(ASPECTS, np.bincount(aspects, minlength=len(ASPECTS)).tolist(), strict=True):
        counted.aspects[name] += number
    hashes = hash_texts(index["key"].combine_chunks())
    least = np.argsort(hashes, kind="stable")[:SHOWN_PER_SPLIT].tolist()
    merged = [*counted.shown[shard.split], *((int(hashes[row]), shard, row) for row in least)]
    counted.shown[shard.split] = sorted(merged, key=lambda place: (place[0], place[1].name))[:SHOWN_PER_SPLIT]


def describe_split(dataset: Dataset, split: str) -> dict[str, Any]:
    """Counts, and the least, median and greatest sizes of a split's shards that have samples."""
    shards = dataset.shards(split)
    filled = [shard for shard in shards if shard.samples] or list(shards)
    ends = (min, statistics.median, max)
    return {
        "samples": dataset.samples(split),
        "bytes": sum(shard.bytes for shard in shards),
        "shards": len(shards),
        "samples_per_shard": [end(shard.samples for shard in filled) for end in ends],
        "bytes_per_shard": [end(shard.bytes for shard in filled) for end in ends],
    }


def rejected_examples(dataset: Dataset) -> dict[str, list[dict[str, str]]]:
    """The first few records of each reason in quarantine, in the order of the files."""
    examples: dict[str, list[dict[str, str]]] = {}
    for uri in quarantine_files(dataset.uri):
        system, path = filesystem(uri)
        with system.open_input_file(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches():
                for reason in pc.unique(batch["reason"]).to_pylist():
                    shown = examples.setdefault(str(reason), [])
                    rows = batch.filter(pc.equal(batch["reason"], reason)).slice(0, EXAMPLES_PER_REASON - len(shown))
                    shown += [{name: str(row[name] or "")[:LONGEST_DETAIL] for name in row} for row in rows.to_pylist()]
    return examples


def histogram_of(counts: Counts) -> dict[str, Any] | None:
    """{"edges", "counts", "beyond", "median", "largest"} in about `BINS` bins of a round width; None where all is 0.

    `beyond` is the number of samples in the long tail, which are in no bin.
    """
    total = int(counts.sum())
    if not total:
        return None
    cumulated = np.cumsum(counts)
    low, high = int(np.flatnonzero(counts)[0]), int(np.searchsorted(cumulated, TAIL * total))
    width = max(1, -(-(high + 1 - low) // BINS))
    magnitude = 10 ** (len(str(width)) - 1)
    width = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= width)
    first = low // width * width
    num_bins = (high - first) // width + 1
    bins = np.zeros(num_bins * width, np.int64)
    part = counts[first : first + len(bins)]
    bins[: len(part)] = part
    return {
        "edges": [first + number * width for number in range(num_bins + 1)],
        "counts": bins.reshape(num_bins, width).sum(1).tolist(),
        "beyond": total - int(bins.sum()),
        "median": int(np.searchsorted(cumulated, total / 2)),
        "largest": int(np.flatnonzero(counts)[-1]),
    }


def shares(counts: Mapping[str, int], order: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """[{"name", "count"}], the most frequent first or in the order given; rows past `MAX_NAMES` become one."""
    names = list(order) if order is not None else sorted(counts, key=lambda name: (-counts[name], name))
    rows = [{"name": name, "count": counts[name]} for name in names[:MAX_NAMES]]
    if rest := sum(counts[name] for name in names[MAX_NAMES:]):
        rows.append({"name": f"{len(names) - MAX_NAMES} others", "count": rest})
    return rows


# --- samples --------------------------------------------------------------------------------------------------------


def show(reader: Reader, shard: ShardInfo, row: int) -> tuple[dict[str, Any], bytes | None]:
    """A sample's key and first captions, and its thumbnail; None where its bytes are damaged."""
    try:
        sample = reader.read(reader.shards.index(shard), row)
    except CorruptArtifactError:
        return {"key": f"{shard.name}, row {row}", "captions": [{"language": "en", "text": "damaged"}]}, None
    shown = [{"language": text.language, "text": shorten(text.text)} for text in sample.captions[:2]]
    more = len(sample.captions) - len(shown)
    return {"key": sample.key, "captions": shown, "more": more}, page.thumbnail(sample.image, THUMBNAIL_PIXELS)


def shorten(text: str) -> str:
    """The beginning of a long caption."""
    return text if len(text) <= LONGEST_CAPTION else text[: LONGEST_CAPTION - 1].rstrip() + "…"


def readable(source: Mapping[str, Any]) -> dict[str, str]:
    """A line of the manifest's sources as text, hashes shortened."""
    return {
        str(name): value[:16] + "…" if isinstance(value, str) and len(value) in (32, 64) else str(value)
        for name, value in source.items()
        if isinstance(value, str | int | float)
    }
