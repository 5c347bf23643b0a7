"""What pages show of scores: their figures, the pairs at both ends, and examples of every task, with pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmflow.core.artifacts import Artifact
from mmflow.core.errors import MmflowError
from mmflow.core.storage import read_bytes
from mmflow.dataset.opened import open_dataset
from mmflow.evaluation.examination import spread
from mmflow.inference.scores import Scores, open_scores
from mmflow.report.page import format_number, format_percent
from mmflow.report.samples import Place, Shown, read_shown

EXAMPLES, EXAMPLE_FILES = 8, 4
NEIGHBOURS, CLASSES = 5, 3  # shown of each row
COPIED = ("model", "tasks", "failed", "similarity", "classes", "labels", "best", "worst")  # from the manifest

Row = dict[str, Any]
Pictures = dict[str, bytes]


def gather_scores(artifact: Artifact) -> tuple[dict[str, Any], Pictures]:
    """The figures of committed scores, and the pictures (JPEG) that they name.

    Rows that are shown get their first `caption` and the name of their `picture`, where these can be read.
    """
    manifest, scores = artifact.manifest, open_scores(artifact.uri)
    seconds = artifact.build["seconds"]
    figures: dict[str, Any] = {
        **{name: manifest[name] for name in COPIED if name in manifest},
        **manifest["totals"],
        "files": len(manifest["files"]),
        "datasets": [{**dataset, "place": _place(dataset["uri"])} for dataset in manifest["datasets"]],
        "seconds": seconds,
        "rows_per_second": manifest["totals"]["rows"] / seconds if seconds else None,
        "examples": _examples(scores),
    }
    for end in ("best", "worst"):
        figures[end] = [{**pair} for pair in figures.get(end, [])]
    shown = [*figures["best"], *figures["worst"], *figures["examples"]]
    pictures = _with_samples(shown, scores.datasets, "")
    neighbours = [row for example in figures["examples"] for row in example["neighbours"]]
    return figures, pictures | _with_samples(neighbours, manifest.get("neighbours", {}), "neighbours/")


def columns_of(scores: Scores) -> list[dict[str, str]]:
    """Name, type and description of each column."""
    schema = pq.read_schema(pa.BufferReader(read_bytes(scores.files[0].uri)))
    columns = [
        {"name": field.name, "type": type_words(field.type), "description": field.metadata[b"description"].decode()}
        for field in schema
    ]
    if len(scores.datasets) > 1:
        columns.insert(0, {"name": "dataset", "type": "string", "description": "its dataset, from the file's folder"})
    return columns


def type_words(kind: pa.DataType) -> str:
    """A column's type in words: "64 × float16", "list of string"."""
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.list_size} × {type_words(kind.value_type)}"
    if pa.types.is_list(kind):
        return f"list of {type_words(kind.value_type)}"
    if pa.types.is_dictionary(kind):
        return type_words(kind.value_type)
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))


def _place(uri: str) -> str:
    """The end of a dataset's URI, which tells people more than its name: openclipart/shard/6f73520d3d4108ff."""
    return "/".join(uri.rstrip("/").split("/")[-3:]).lstrip("/")


# --- rows that are shown ----------------------------------------------------------------------------------------------


def _examples(scores: Scores) -> list[Row]:
    """Rows spread over a few files, each with what the model says of it."""
    files = [scores.files[place] for place in spread(len(scores.files), EXAMPLE_FILES)]
    rows = []
    for file in files:
        opened = pq.ParquetFile(io.BytesIO(read_bytes(file.uri)))
        names = [field.name for field in opened.schema_arrow if not pa.types.is_fixed_size_list(field.type)]
        table = opened.read(columns=names)
        good = pc.is_null(table["error"])
        if "questions" in names:
            good = pc.and_(good, pc.greater(pc.list_value_length(table["questions"]), 0))
        table = table.filter(good)
        for row in table.take(spread(len(table), EXAMPLES // len(files))).to_pylist():
            place = {name: row[name] for name in ("key", "shard", "row")}
            neighbours = _neighbours(row)
            rows.append({"dataset": file.dataset, **place, "says": list(_says(row)), "neighbours": neighbours})
    return rows


def _says(row: Row) -> Iterator[dict[str, str]]:
    """{"of", "text"}: what the model says of a row, task by task."""
    for text in row.get("written_captions", []):
        yield {"of": "writes", "text": text}
    for question, answer in zip(row.get("questions", []), row.get("answers", []), strict=True):
        yield {"of": question, "text": answer or "undecided"}
    for of, names, odds in (("nearest classes", "classes", "class_odds"), ("classes", "labels", "label_odds")):
        if names in row:
            best = list(zip(row[names], row[odds], strict=True))[:CLASSES]
            yield {"of": of, "text": ", ".join(f"{name} {format_percent(share)}" for name, share in best)}
    if row.get("match") is not None:
        yield {"of": "caption belongs", "text": format_percent(1 / (1 + math.exp(-row["match"])))}
    for nats, tokens in zip(row.get("caption_nats", []), row.get("caption_tokens", []), strict=True):
        yield {"of": "perplexity of its caption", "text": format_number(math.exp(nats / tokens))}
    if row.get("similarity") is not None:
        yield {"of": "similarity", "text": f"{row['similarity']:.2f}"}


def _neighbours(row: Row) -> list[Row]:
    names = {name: f"neighbour_{name}s" for name in ("key", "dataset", "shard", "row")}
    names["similarity"] = "neighbour_similarity"
    if names["key"] not in row:
        return []
    columns = [row[column][:NEIGHBOURS] for column in names.values()]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _with_samples(rows: Sequence[Row], datasets: Mapping[str, str], prefix: str) -> Pictures:
    """Add the captions and the names of the pictures to rows of several datasets; the pictures."""
    pictures: Pictures = {}
    for name, uri in datasets.items():
        own = [row for row in rows if row["dataset"] == name]
        samples = _samples(uri, [(row["shard"], row["row"]) for row in own])
        for row in own:
            sample = samples.get((row["shard"], row["row"]))
            if sample is None or sample.key != row["key"]:  # the dataset was replaced by another
                continue
            if sample.captions:
                row["caption"] = sample.captions[0]
            if sample.picture is not None:
                row["picture"] = f"{prefix}{name}/{row['shard']}/{row['row']}"
                pictures[row["picture"]] = sample.picture
    return pictures


def _samples(uri: str, places: Sequence[Place]) -> dict[Place, Shown]:
    try:
        return read_shown(open_dataset(uri), places) if places else {}
    except MmflowError:  # the dataset is gone: the page does without its pictures
        return {}
