"""The figures of a whole loop, gathered from its committed artifacts: `report.json` for programs, `report.html` for
people."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from math import isfinite, nan
from typing import Any

from mmflow.core.artifacts import Artifact
from mmflow.core.storage import exists, join, local_path, read_bytes, read_json, write_bytes, write_json
from mmflow.recipe import dump_recipe
from mmflow.stages.loop import STAGES, Loop
from mmflow.stages.training import JOURNAL

VERSIONS = ("mmflow", "torch", "ray", "deepspeed", "transformers", "mlflow", "dagster", "pyarrow", "webdataset")
EXAMPLES = 24
QUERIES = 12
RIGHT_QUERIES = 7  # of the twelve; the rest are wrong, or the grid would flatter
QUARANTINE_ROWS = 50
THUMBNAIL_PIXELS = 128
RECALLS = ("R@10", "R@5", "R@1")


def write_report(loop: Loop) -> str:
    """Gather, write both files beside the artifacts, and return the URI of the page."""
    from mmflow.report.run_page import render_report

    report, images = gather(loop)
    workspace = loop.recipe.workspace
    write_json(join(workspace, "report.json"), report)
    page = join(workspace, "report.html")
    write_bytes(page, render_report(report, images).encode())
    return page


def gather(loop: Loop) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The report's data, as `mmflow.report.run_page.render_report` takes it, and the pictures it shows by key."""
    import psutil

    artifacts = {name: loop.committed(name) for name in loop.stages}
    retrieval = _retrieval(artifacts["evaluate"], loop)
    dataset = _dataset(artifacts["shard"])
    shown = {example["key"] for example in dataset["examples"]}
    for query in retrieval.get("queries", ()):
        shown |= {query["key"], *(result["key"] for result in query["results"])}
    looks, written = _looks(artifacts["evaluate"], loop), _written(artifacts["evaluate"], loop)
    for row in (*looks.get("rows", ()), *written.get("captions", ()), *written.get("answers", ())):
        shown.add(row["key"])
    report = {
        "name": loop.recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": dump_recipe(loop.recipe),
        "machine": {
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "accelerator": _accelerator(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in VERSIONS},
        # Of the runs that built the stages, which a rerun does not change.
        "seconds": round(sum(artifact.build["seconds"] for artifact in artifacts.values()), 1),
        "peak_memory_bytes": max(artifact.build.get("peak_memory_bytes", 0) for artifact in artifacts.values()),
        "stages": [_stage(name, artifact, loop.recipe.workspace) for name, artifact in artifacts.items()],
        "dataset": dataset,
        "training": _training(artifacts),
        "evaluation": {
            "headline": _headline(loop.recipe.promote.metric),
            "splits": read_json(artifacts["evaluate"].file("metrics.json")),
        },
        "retrieval": retrieval,
        "looks": looks,
        "written": written,
        "comparison": _comparison(artifacts),
        "promotion": {name: artifacts["promote"].manifest[name] for name in PROMOTION},
        "scores": _scores(artifacts["score"]) if "score" in artifacts else {},
        "lineage": _lineage(artifacts),
    }
    return report, _pictures(artifacts["shard"], shown)


PROMOTION = ("model", "version", "decision", "reasons", "checks", "champion_before")


def _accelerator() -> str:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else "cpu"


def _stage(name: str, artifact: Artifact, workspace: str) -> dict[str, Any]:
    path = local_path(artifact.uri)
    return {
        "stage": name,
        "status": "built" if artifact.built else "reused",
        "seconds": artifact.build["seconds"],
        "artifact": os.path.relpath(path) if path else artifact.uri,
        "identity": artifact.manifest["identity"],
        "summary": STAGES[name].summary(artifact.manifest),
    }


def _headline(metric: str) -> dict[str, str]:
    split, direction, name = metric.split("/", 2)
    return {"split": split, "direction": direction, "metric": name}


def _dataset(artifact: Artifact) -> dict[str, Any]:
    import io

    import pyarrow.parquet as pq

    from mmflow.dataset.manifest import quarantine_uri
    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader

    totals = artifact.manifest["totals"]
    dataset = open_dataset(artifact.uri)
    rows: list[dict[str, Any]] = []
    for shard in artifact.manifest["shards"]:
        rejected = quarantine_uri(artifact.uri, shard["name"])
        if len(rows) < QUARANTINE_ROWS and exists(rejected):
            rows += pq.read_table(io.BytesIO(read_bytes(rejected))).to_pylist()
    examples = []
    reader = Reader(dataset, dataset.splits[0] if "train" not in dataset.splits else "train")
    for row in range(min(EXAMPLES, reader.shards[0].samples)):
        sample = reader.read(0, row)
        captions = [{"language": each.language, "text": each.text} for each in sample.captions]
        examples.append({"key": sample.key, "captions": captions, "split": reader.shards[0].split})
    return {
        "fingerprint": artifact.fingerprint,
        "samples": totals["samples"],
        "bytes": totals["bytes"],
        "splits": {
            split: {"samples": dataset.samples(split), "shards": len(dataset.shards(split))} for split in dataset.splits
        },
        "examples": examples,
        "quarantine": {
            "records": totals["quarantined"],
            "reasons": totals["reasons"],
            "rows": [{name: row[name] for name in ("source", "reason", "detail")} for row in rows[:QUARANTINE_ROWS]],
        },
    }


def _training(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    from mmflow.training.journal import curves, journal_at

    found = {}
    for role, stage in (("teacher", "pretrain"), ("student", "distill")):
        if stage not in artifacts:
            continue
        artifact = artifacts[stage]
        lines = journal_at(artifact.file(JOURNAL))
        drawn = curves(lines)
        times = [line["time"] for line in lines]
        found[role] = {
            "stage": stage,
            **{
                name: artifact.manifest[name]
                for name in ("parameters", "steps", "global_batch_size", "num_workers", "zero_stage")
            },
            "stopped": artifact.manifest.get("stopped"),
            "restarts": max(0, sum(1 for line in lines if line.get("event") == "started") - 1),
            "seconds": round(times[-1] - times[0], 1) if times else 0.0,
            "samples_per_second": _mean(drawn.get("samples_per_second", [])),
            "loader_stall_share": _mean(drawn.get("loader_stall", [])),
            "curves": drawn,
        }
    return found


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in points) / len(points) if points else 0.0


def _retrieval(evaluation: Artifact, loop: Loop) -> dict[str, Any]:
    """Right and wrong answers of the candidate on the headline's split, spread evenly over each kind."""
    split = _headline(loop.recipe.promote.metric)["split"]
    model = loop.recipe.promote.candidate
    queries = read_json(evaluation.file("details.json"))[model][split].get("retrieval", [])
    if not queries:  # no shared space to find anything in
        return {}
    right = [query for query in queries if query["rank"] == 1]
    wrong = [query for query in queries if query["rank"] > 1]
    num_right = max(min(RIGHT_QUERIES, len(right)), QUERIES - len(wrong))
    chosen = _spread(right, num_right) + _spread(wrong, QUERIES - num_right)
    return {"split": split, "model": model, "queries": chosen}


def _looks(evaluation: Artifact, loop: Loop) -> dict[str, Any]:
    model = loop.recipe.promote.candidate
    splits = read_json(evaluation.file("details.json"))[model]
    rows = [row for details in splits.values() for row in details.get("attention", [])]
    return {"model": model, "rows": rows} if rows else {}


def _written(evaluation: Artifact, loop: Loop) -> dict[str, Any]:
    split = _headline(loop.recipe.promote.metric)["split"]
    model = loop.recipe.promote.candidate
    details = read_json(evaluation.file("details.json"))[model][split]
    found = {name: value for name, value in details.items() if name not in ("retrieval", "attention")}
    return {"model": model, "split": split, **found} if found else {}


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _comparison(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    if "distill" not in artifacts:
        return {}
    splits = read_json(artifacts["evaluate"].file("metrics.json"))
    speed = read_json(artifacts["evaluate"].file("speed.json"))
    share = {
        split: share_of_teacher(found["models"]["teacher"], found["models"]["student"])
        for split, found in splits.items()
    }
    return {
        "teacher_parameters": artifacts["pretrain"].manifest["parameters"],
        "student_parameters": artifacts["distill"].manifest["parameters"],
        "share_of_teacher": share,
        **{
            measure: {name: speed[name][measure] for name in ("teacher", "student")}
            for measure in ("latency_ms", "pictures_per_second")
            if measure in speed["student"]  # an evaluation of before had no throughput
        },
    }


def share_of_teacher(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, float]:
    """By flat name, what the student has of each of the teacher's metrics that are the better the higher; recalls of
    texts among pictures first."""
    from mmflow.evaluation.evaluate import flatten
    from mmflow.report.run_page import is_share

    theirs, ours = flatten(teacher), flatten(student)
    first = [f"text_to_image/{name}" for name in RECALLS]
    names = [*first, *(name for name in theirs if name not in first)]
    return {
        name: ours[name] / theirs[name]
        for name in names
        if is_share(name) and theirs.get(name, 0.0) > 0 and isfinite(ours.get(name, nan))
    }


def _scores(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "rows": manifest["totals"]["rows"],
        "files": len(manifest["files"]),
        "bytes": manifest["totals"]["bytes"],
        "model_digest": manifest["model_digest"],
        "similarity": manifest["similarity"],
        "classes": manifest["classes"],
    }


def _lineage(artifacts: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    return [
        {
            "stage": name,
            "inputs": [f"{each} {fingerprint[:12]}" for each, fingerprint in artifact.manifest["inputs"].items()],
            "output": f"{artifact.manifest['kind']} {artifact.fingerprint[:12]}",
        }
        for name, artifact in artifacts.items()
    ]


def _pictures(dataset: Artifact, keys: Iterable[str]) -> dict[str, bytes]:
    """Thumbnails of some samples, by key."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader
    from mmflow.imaging.decode import decode

    wanted, found = set(keys), dict[str, bytes]()
    data = open_dataset(dataset.uri)
    for split in data.splits:
        reader = Reader(data, split)
        for ordinal, shard in enumerate(reader.shards):
            rows = data.index(shard)["key"].to_pylist()
            for row in (row for row, key in enumerate(rows) if key in wanted):
                sample = reader.read(ordinal, row)
                picture = Image.fromarray(decode(sample.image, sample.extension, THUMBNAIL_PIXELS))
                picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
                found[sample.key] = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=85)
    return found
