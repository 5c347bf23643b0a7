"""Scores: what one model says of every row of whole datasets, one Parquet file a shard, under one manifest.

scores/00000.parquet                       of one dataset
scores/dataset=<name>/00000.parquet        of several; readers of Parquet add the column `dataset`
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmflow.core.artifacts import content_hash
from mmflow.core.progress import Report
from mmflow.core.storage import exists, read_bytes
from mmflow.dataset.format import ShardInfo, write_parquet
from mmflow.dataset.opened import open_dataset
from mmflow.inference.compute import Request, check_errors, compute
from mmflow.inference.config import EmbedConfig, ScoreConfig, TasksConfig
from mmflow.inference.result import Stored, column, embeddings_of, vectors_of
from mmflow.inference.runner import Model, in_parallel
from mmflow.inference.scores import file_uri

HISTOGRAM_EDGES = [round(-1 + 0.05 * step, 2) for step in range(41)]
EXTREMES = 6  # best and worst pairs that the manifest names
ERRORS = 20  # that the manifest names
PLACE = {"key": "the sample's key", "split": "its split", "shard": "its shard", "row": "its row in the shard"}
"""The columns that say which row it is, with their descriptions."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A model over datasets, (name, URI)."""

    model: Model
    datasets: tuple[tuple[str, str], ...]
    tasks: TasksConfig
    splits: tuple[str, ...] | None

    def shards(self) -> Iterator[tuple[str, ShardInfo]]:
        """(dataset's name, shard), those with samples, in the order of the files."""
        for name, uri in self.datasets:
            data = open_dataset(uri)
            of_splits = [shard for split in self.splits or data.splits for shard in data.shards(split)]
            for shard in sorted(of_splits, key=lambda shard: shard.name):
                if shard.samples:
                    yield name, shard


def score(uri: str, store: str, scored: Scored, settings: ScoreConfig, progress: Report) -> Mapping[str, Any]:
    """Compute what is missing of the results in `store` and write the scores; the manifest's fields.

    On Ray where it is initialised. Raises as `compute`.
    """
    requests = [
        Request(model=scored.model, dataset=data_uri, split=split, results=scored.tasks.results)
        for _, data_uri in scored.datasets
        for split in scored.splits or open_dataset(data_uri).splits
    ]
    compute(
        requests,
        store,
        batch_size=settings.batch_size,
        pool=settings,
        max_errors=settings.max_errors,
        progress=progress,
    )
    several = len(scored.datasets) > 1
    files = [
        ScoresFile(scored, store, file_uri(uri, name, shard.name, several=several), name, shard)
        for name, shard in scored.shards()
    ]
    manifest = _manifest(scored, list(in_parallel(ScoresFile.make, files)))
    if failed := manifest["failed"]:  # also of rows that were computed earlier
        first = "{shard}, row {row}: {error}".format_map(failed[0])
        check_errors(manifest["totals"]["errors"], manifest["totals"]["rows"], first, settings.max_errors)
    return manifest


@dataclass(frozen=True)
class ScoresFile:
    """The scores of one shard, put together from its results."""

    scored: Scored
    store: str
    uri: str
    dataset: str  # its name
    shard: ShardInfo

    def make(self) -> dict[str, Any]:
        """Write the file and say what it holds. One that a killed run has left is kept, unless it has errors: its shard
        may have been restored since."""
        if exists(self.uri) and not (held := self._held())["errors"]:
            return held
        write_parquet(self.uri, self._table())
        return self._held()

    def _held(self) -> dict[str, Any]:
        data = read_bytes(self.uri)
        entry = {"name": self.shard.name, "dataset": self.dataset, "rows": self.shard.samples, "bytes": len(data)}
        return {
            "file": entry | {"sha256": hashlib.sha256(data).hexdigest()},
            **_summary(pq.read_table(io.BytesIO(data)), self.dataset),
        }

    def _table(self) -> pa.Table:
        digest, results = self.scored.model.digest, self.scored.tasks.results
        tables = [Stored(self.store, digest, result).read(self.shard) for result in results]
        rows = self.shard.samples
        place = {"split": self.shard.split, "shard": self.shard.name}
        columns: dict[str, Any] = {
            name: tables[0][name] if name in ("key", "row") else pa.array([place[name]] * rows).dictionary_encode()
            for name in PLACE
        }
        fields = [column(name, columns[name].type, text) for name, text in PLACE.items()]
        for table in tables:
            for field in table.schema:
                if field.name not in ("key", "row", "error"):
                    columns[field.name] = table[field.name]
                    fields.append(field)
        if self.scored.tasks.embed is not None:
            fields = _with_similarity(columns, fields, self.scored.tasks.embed)
        errors = (table["error"].combine_chunks() for table in tables)
        columns["error"] = reduce(pc.coalesce, errors)
        fields.append(tables[0].schema.field("error"))
        return pa.table([columns[field.name] for field in fields], schema=pa.schema(fields))


def _with_similarity(columns: dict[str, Any], fields: Sequence[pa.Field], embed: EmbedConfig) -> list[pa.Field]:
    """Vectors cut to the width that is asked for, and their cosine."""
    vectors = {name: embeddings_of(columns[name]) for name in ("image_embedding", "caption_embedding")}
    if embed.width is not None:
        for name, values in vectors.items():
            kept = values[:, : embed.width]
            vectors[name] = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            columns[name] = vectors_of(np.nan_to_num(vectors[name]), embed.dtype, np.isnan(values[:, 0]))
    images, captions = vectors.values()
    cosine = (images * captions).sum(axis=1)
    columns["similarity"] = pa.array(cosine, pa.float32(), from_pandas=True)
    kept_fields = [field.with_type(columns[field.name].type) for field in fields]
    return [*kept_fields, column("similarity", pa.float32(), "cosine of picture and caption; null without a caption")]


# --- what the manifest says -------------------------------------------------------------------------------------------


def _summary(table: pa.Table, dataset: str) -> dict[str, Any]:
    """Of one file: errors, the spread of the similarities, the pairs at both ends, how often each class is the best."""

    def rows(table: pa.Table, *columns: str) -> list[dict[str, Any]]:
        return [{"dataset": dataset, **row} for row in table.select([*PLACE, *columns]).to_pylist()]

    failed = table.filter(pc.is_valid(table["error"]))
    summary: dict[str, Any] = {"errors": failed.num_rows, "failed": rows(failed.slice(0, ERRORS), "error")}
    if "similarity" in table.column_names:
        similarity = np.clip(table["similarity"].drop_null().to_numpy(), -1, 1)
        summary["counts"] = np.histogram(similarity, bins=HISTOGRAM_EDGES)[0].tolist()
        pairs = table.filter(pc.is_valid(table["similarity"]))
        ordered = pairs.select([*PLACE, "similarity"]).sort_by([("similarity", "descending"), ("row", "ascending")])
        summary["best"] = rows(ordered.slice(0, EXTREMES), "similarity")
        summary["worst"] = rows(ordered.slice(max(0, len(ordered) - EXTREMES)), "similarity")
    for name in ("classes", "labels"):
        if name in table.column_names:
            best = pc.list_element(table[name].drop_null(), 0)
            summary[name] = dict(Counter(best.to_pylist()))
    return summary


def _manifest(scored: Scored, made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    entries = [summary["file"] for summary in made]
    datasets = []
    for name, uri in scored.datasets:
        own = [summary for summary in made if summary["file"]["dataset"] == name]
        totals = {"rows": sum(one["file"]["rows"] for one in own), "errors": sum(one["errors"] for one in own)}
        datasets.append({"name": name, "uri": uri, "fingerprint": open_dataset(uri).fingerprint, **totals})
    totals = {part: sum(dataset[part] for dataset in datasets) for part in ("rows", "errors")}
    manifest: dict[str, Any] = {
        "fingerprint": content_hash([{**entry, "dataset": None} for entry in entries]),
        "files": entries,
        "datasets": datasets,
        "tasks": {name: section.identity() for name, section in scored.tasks.named.items()},
        "totals": {**totals, "bytes": sum(entry["bytes"] for entry in entries)},
        "failed": [row for summary in made for row in summary["failed"]][:ERRORS],
    }
    if scored.tasks.neighbours is not None:
        manifest["neighbours"] = dict(scored.tasks.neighbours.others.datasets)
    if any("counts" in summary for summary in made):
        counts = np.sum([summary["counts"] for summary in made], axis=0)
        manifest["similarity"] = {"edges": HISTOGRAM_EDGES, "counts": counts.tolist()}
        for end, sign in (("best", -1), ("worst", 1)):
            pairs = [pair for summary in made for pair in summary[end]]
            manifest[end] = sorted(pairs, key=lambda pair: sign * pair["similarity"])[:EXTREMES]
    for name in ("classes", "labels"):
        counted: Counter[str] = sum((Counter(summary.get(name, {})) for summary in made), Counter())
        if counted:
            manifest[name] = [{"name": label, "rows": rows} for label, rows in counted.most_common()]
    return manifest
