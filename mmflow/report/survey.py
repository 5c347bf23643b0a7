"""The figures of a whole dataset from its index and quarantine alone, a shard at a time.

Memory does not grow with the samples: lengths and sizes are counted by their value, and of keys only the few that are
shown are kept. Repeated pictures and captions are counted with 8 bytes a sample, at most 1 GiB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmflow.core.storage import filesystem
from mmflow.dataset.index import read_column
from mmflow.dataset.keys import KEYS_PER_PASS, count_repeats, hash_texts
from mmflow.dataset.manifest import ShardInfo, index_uri, quarantine_files
from mmflow.dataset.opened import Dataset

MAX_VALUE = 20_000  # pixels, characters, tokens, KiB: what is more is counted as this
BINS = 32
TAIL = 0.995  # of the samples are within a histogram; one caption of 20,000 characters would flatten it
SHOWN_PER_SPLIT = 24
EXAMPLES_PER_REASON = 3
LONGEST_DETAIL = 300
MAX_NAMES = 40  # languages, licences: rows of a table
# Width over height, up to and including.
ASPECTS = (
    ("taller than 1:2", 0.5),
    ("1:2 to 4:5", 0.8),
    ("about square, 4:5 to 5:4", 1.25),
    ("5:4 to 2:1", 2.0),
    ("wider than 2:1", float("inf")),
)

Counts = NDArray[np.int64]  # (MAX_VALUE + 1,): how often each value came


@dataclass
class Survey:
    """What was counted. `shown` has of each split (hash of the key, shard, row), the least hashes first."""

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
    side: Counts = field(default_factory=lambda: np.zeros(MAX_VALUE + 1, np.int64))
    kibibytes: Counts = field(default_factory=lambda: np.zeros(MAX_VALUE + 1, np.int64))
    characters: Counts = field(default_factory=lambda: np.zeros(MAX_VALUE + 1, np.int64))
    tokens: Counts = field(default_factory=lambda: np.zeros(MAX_VALUE + 1, np.int64))
    shown: dict[str, list[tuple[int, ShardInfo, int]]] = field(default_factory=dict)


def survey(dataset: Dataset) -> Survey:
    """Count every shard. Raises CorruptArtifactError where an index is none."""
    found = Survey()
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    for shard in shards:
        found.samples[shard.split] += shard.samples
        found.shown.setdefault(shard.split, [])
        if shard.samples:
            add_shard(found, shard, dataset.index(shard))

    if not dataset.adopted:  # nobody looked into those
        names = [shard.name for shard in shards]
        found.repeated_pictures = repeats_of(dataset, names, "pixel_hash", found.samples.total())
        found.repeated_captions = repeats_of(dataset, names, "caption_hashes", found.captions)
    return found


def repeats_of(dataset: Dataset, shards: Sequence[str], column: str, num_values: int) -> int:
    """How many hashes of a column, lists of them or single ones, came before."""

    def hashes_of(shard: int) -> NDArray[np.uint64]:
        values = read_column(index_uri(dataset.uri, shards[shard]), column)
        if pa.types.is_list(values.type):
            values = values.flatten()
        return np.asarray(values.drop_null(), np.uint64)

    return count_repeats(hashes_of, len(shards), num_passes=max(1, -(-num_values // KEYS_PER_PASS)))


def add_shard(found: Survey, shard: ShardInfo, index: pa.Table) -> None:
    """Count the samples of one shard."""
    for counter, values in (
        (found.languages, pc.list_flatten(index["languages"])),
        (found.licenses, index["license"].fill_null("")),
        (found.formats, index["image_extension"]),
    ):
        for each in pc.value_counts(values).to_pylist():
            counter[str(each["values"])] += each["counts"]
    found.captions += len(pc.list_flatten(index["languages"]))
    num_frames = pc.fill_null(pc.list_value_length(index["frames"]), 0).to_numpy()
    found.clips += int((num_frames > 0).sum())
    found.frames += int(num_frames.sum()) + int((num_frames > 0).sum())
    width, height = index["width"].to_numpy(), index["height"].to_numpy()
    for counts, column in (
        (found.side, np.minimum(width, height)),
        (found.kibibytes, index["image_bytes"].to_numpy() // 1024),
        (found.characters, index["caption_characters"].drop_null().to_numpy()),
        (found.tokens, index["caption_tokens"].drop_null().to_numpy()),
    ):
        counts += np.bincount(np.clip(column, 0, MAX_VALUE), minlength=MAX_VALUE + 1)
    kinds = np.searchsorted([bound for _, bound in ASPECTS], width / height)
    for (name, _), number in zip(ASPECTS, np.bincount(kinds, minlength=len(ASPECTS)).tolist(), strict=True):
        found.aspects[name] += number
    hashes = hash_texts(index["key"].combine_chunks())
    least = np.argsort(hashes, kind="stable")[:SHOWN_PER_SPLIT].tolist()
    merged = [*found.shown[shard.split], *((int(hashes[row]), shard, row) for row in least)]
    found.shown[shard.split] = sorted(merged, key=lambda each: (each[0], each[1].name))[:SHOWN_PER_SPLIT]


def rejected_examples(dataset: Dataset) -> dict[str, list[dict[str, str]]]:
    """Of each reason in quarantine the first few records, in the order of the files."""
    found: dict[str, list[dict[str, str]]] = {}
    for uri in quarantine_files(dataset.uri):
        system, path = filesystem(uri)
        with system.open_input_file(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches():
                for reason in pc.unique(batch["reason"]).to_pylist():
                    shown = found.setdefault(str(reason), [])
                    rows = batch.filter(pc.equal(batch["reason"], reason)).slice(0, EXAMPLES_PER_REASON - len(shown))
                    shown += [{name: str(row[name] or "")[:LONGEST_DETAIL] for name in row} for row in rows.to_pylist()]
    return found


def histogram_of(counts: Counts) -> dict[str, Any] | None:
    """{"edges", "counts", "beyond", "median", "largest"} in about `BINS` bins of round width; None where all is 0.

    `beyond` samples of the long tail are in no bin.
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
    """[{"name", "count"}], the most frequent first or in the order given; what is past `MAX_NAMES` is one row."""
    names = list(order) if order is not None else sorted(counts, key=lambda name: (-counts[name], name))
    rows = [{"name": name, "count": counts[name]} for name in names[:MAX_NAMES]]
    if rest := sum(counts[name] for name in names[MAX_NAMES:]):
        rows.append({"name": f"{len(names) - MAX_NAMES} others", "count": rest})
    return rows
