"""The figures of a run, gathered from its committed artifacts: `report.json` for programs, `report.html` for people."""

from __future__ import annotations

import io
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from math import isfinite, nan
from statistics import fmean
from typing import Any

import psutil
import pyarrow.parquet as pq

from mmflow.core.artifacts import Artifact
from mmflow.core.storage import join, read_bytes, read_json, write_bytes, write_json
from mmflow.dataset.format import quarantine_files
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Reader
from mmflow.evaluation.examination import DETAILS, METRICS, SPEED, flatten, spread
from mmflow.recipe import dump_recipe
from mmflow.registry.gate import lower_is_better
from mmflow.report.page import is_share
from mmflow.report.run_page import render_report
from mmflow.report.samples import read_shown
from mmflow.report.scores import gather_scores
from mmflow.stages.evaluate import MODELS
from mmflow.stages.loop import STAGES, Loop
from mmflow.stages.training import JOURNAL
from mmflow.training.journal import curves, journal_at

VERSIONS = ("mmflow", "torch", "ray", "deepspeed", "transformers", "mlflow", "dagster", "pyarrow", "webdataset")
EXAMPLES = 24
QUERIES, RIGHT_QUERIES = 12, 7  # the others are wrong ones, or the grid would flatter
QUARANTINE_ROWS = 50
TRAINING = ("parameters", "steps", "global_batch_size", "num_workers", "zero_stage")
PROMOTION = ("model", "version", "decision", "reasons", "checks", "champion_before")

Artifacts = Mapping[str, Artifact]  # by stage


def write_report(loop: Loop) -> str:
    """Write both files beside the artifacts, and return the URI of the page."""
    report, images = gather(loop)
    workspace = loop.recipe.workspace
    write_json(join(workspace, "report.json"), report)
    page = join(workspace, "report.html")
    write_bytes(page, render_report(report, images).encode())
    return page


def gather(loop: Loop) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The report's data, as `render_report` takes it, and the pictures that it shows, by key."""
    artifacts = {name: loop.committed(name) for name in loop.stages}
    dataset = open_dataset(artifacts["shard"].uri)
    candidate = loop.recipe.promote.candidate
    split, direction, metric = loop.recipe.promote.metric.split("/", 2)
    details = read_json(artifacts["evaluate"].file(DETAILS))[candidate]
    queries = _queries(details[split].get("retrieval", []))
    looks = [row for entry in details.values() for row in entry.get("attention", [])]
    written = {name: value for name, value in details[split].items() if name not in ("retrieval", "attention")}
    subject = {"model": candidate, "split": split}
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
        # Of the runs that built the stages: a rerun that builds nothing changes neither.
        "seconds": round(sum(artifact.build["seconds"] for artifact in artifacts.values()), 1),
        "peak_memory_bytes": max(artifact.build.get("peak_memory_bytes", 0) for artifact in artifacts.values()),
        "stages": [_stage(name, artifact) for name, artifact in artifacts.items()],
        "dataset": _dataset(artifacts["shard"], dataset),
        "training": {role: _training(stage, artifacts[stage]) for role, stage in MODELS.items() if stage in artifacts},
        "evaluation": {
            "headline": {"split": split, "direction": direction, "metric": metric},
            "splits": read_json(artifacts["evaluate"].file(METRICS)),
        },
        "retrieval": {**subject, "queries": queries} if queries else {},
        "looks": {**subject, "rows": looks} if looks else {},
        "written": {**subject, **written} if written else {},
        "comparison": _comparison(artifacts),
        "promotion": {name: artifacts["promote"].manifest[name] for name in PROMOTION},
        "lineage": [_lineage(name, artifact) for name, artifact in artifacts.items()],
    }
    shown = read_shown(dataset, _references(report)).values()
    pictures = {sample.key: sample.picture for sample in shown if sample.picture is not None}
    if "score" in artifacts:  # of any datasets, so with pictures of their own
        report["scores"], scored = gather_scores(artifacts["score"])
        pictures |= scored
    return report, pictures


def _accelerator() -> str:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else "cpu"


def _stage(name: str, artifact: Artifact) -> dict[str, Any]:
    identity = artifact.manifest["identity"]
    return {
        "stage": name,
        "status": "built" if artifact.built else "reused",
        "seconds": artifact.build["seconds"],
        "artifact": f"{name}/{identity}",  # in the workspace, where the report lies too
        "identity": identity,
        "summary": STAGES[name].summary(artifact.manifest),
    }


def _dataset(artifact: Artifact, dataset: Dataset) -> dict[str, Any]:
    totals = artifact.manifest["totals"]
    rejected: list[dict[str, Any]] = []
    for file in quarantine_files(artifact.uri):
        if len(rejected) < QUARANTINE_ROWS:
            rejected += pq.read_table(io.BytesIO(read_bytes(file))).to_pylist()
    examples = []
    reader = Reader(dataset, dataset.splits[0] if "train" not in dataset.splits else "train")
    shard = reader.shards[0]
    for row in range(min(EXAMPLES, shard.samples)):
        sample = reader.read(0, row)
        captions = [{"language": caption.language, "text": caption.text} for caption in sample.captions]
        place = {"shard": shard.name, "row": row}
        examples.append({"key": sample.key, **place, "captions": captions, "split": shard.split})
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
            "rows": [
                {name: record[name] for name in ("source", "reason", "detail")} for record in rejected[:QUARANTINE_ROWS]
            ],
        },
    }


def _training(stage: str, artifact: Artifact) -> dict[str, Any]:
    lines = journal_at(artifact.file(JOURNAL))
    drawn = curves(lines)
    times = [line["time"] for line in lines]
    return {
        "stage": stage,
        **{name: artifact.manifest[name] for name in TRAINING},
        "stopped": artifact.manifest.get("stopped"),
        "restarts": max(0, sum(1 for line in lines if line.get("event") == "started") - 1),
        "seconds": round(times[-1] - times[0], 1) if times else 0.0,
        "samples_per_second": _mean(drawn.get("samples_per_second", [])),
        "loader_stall_share": _mean(drawn.get("loader_stall", [])),
        "curves": drawn,
    }


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return fmean(value for _, value in points) if points else 0.0


def _queries(queries: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Right and wrong answers, each kind evenly spread."""
    right = [query for query in queries if query["rank"] == 1]
    wrong = [query for query in queries if query["rank"] > 1]
    num_right = max(min(RIGHT_QUERIES, len(right)), QUERIES - len(wrong))
    return [*_spread(right, num_right), *_spread(wrong, QUERIES - num_right)]


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    return [items[place] for place in spread(len(items), count)]


def _comparison(artifacts: Artifacts) -> dict[str, Any]:
    if "distill" not in artifacts:
        return {}
    splits = read_json(artifacts["evaluate"].file(METRICS))
    speed = read_json(artifacts["evaluate"].file(SPEED))
    parameters = {f"{role}_parameters": artifacts[stage].manifest["parameters"] for role, stage in MODELS.items()}
    return parameters | {
        "share_of_teacher": {
            split: share_of_teacher(entry["models"]["teacher"], entry["models"]["student"])
            for split, entry in splits.items()
        },
        "latency_ms": {role: speed[role]["latency_ms"] for role in MODELS},
        "pictures_per_second": {role: speed[role]["pictures_per_second"] for role in MODELS},
    }


def share_of_teacher(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, float]:
    """The student's share of each of the teacher's metrics where higher is better, by flat name. Slices are left out:
    there may be many."""
    theirs, own = flatten(teacher), flatten(student)
    return {
        name: own[name] / value
        for name, value in theirs.items()
        if is_share(name)
        and not lower_is_better(name)
        and not name.startswith("slices/")
        and value > 0
        and isfinite(own.get(name, nan))
    }


def _lineage(name: str, artifact: Artifact) -> dict[str, Any]:
    return {
        "stage": name,
        "inputs": [f"{source} {fingerprint[:12]}" for source, fingerprint in artifact.manifest["inputs"].items()],
        "output": f"{artifact.manifest['kind']} {artifact.fingerprint[:12]}",
    }


def _references(value: Any) -> Iterator[tuple[str, int]]:
    """(shard, row) of every sample that some part of the report names."""
    if isinstance(value, dict):
        if "shard" in value and "row" in value:
            yield value["shard"], value["row"]
        value = list(value.values())
    if isinstance(value, list):
        for child in value:
            yield from _references(child)
