"""Stage `evaluate`: every model of the loop, an untrained one and chance, on the same rows, written as one artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

from mmflow.artifacts import content_hash, join, read_json, write_json
from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.evaluate import Examination, Metrics, Rows, chance, examine, flatten, read_rows
from mmflow.models.embed import embed_images
from mmflow.models.model import build
from mmflow.models.package import LoadedModel, load_package, read_package
from mmflow.progress import Report
from mmflow.shards.dataset import open_dataset

METRICS = "metrics.json"  # {split: {"rows", "models": {model: metrics}}}
RETRIEVAL = "retrieval.json"  # {model: {split: [query, …]}}
SPEED = "speed.json"  # {model: {"latency_ms"}}: not part of the fingerprint, because it is never the same twice
LATENCY_RUNS = 25
UNTRAINED_SEED = 1_000_003  # far from the seeds that people choose


def evaluate_models(
    uri: str,
    *,
    dataset: str,
    packages: Mapping[str, str],
    settings: EvaluateConfig,
    seed: int,
    progress: Report,
) -> Mapping[str, Any]:
    """Examine the packages (model → URI) and write metrics, retrieval results and speed; the manifest's fields."""
    data = open_dataset(dataset)
    splits = [read_rows(data, split, settings.languages) for split in settings.splits]
    metrics: dict[str, dict[str, Any]] = {
        rows.split: {"rows": len(rows.samples), "models": {"chance": chance(rows, settings.zero_shot)}}
        for rows in splits
    }
    retrieval: dict[str, dict[str, Any]] = {}
    speed = {}
    models = list(_models(packages, seed))
    for done, (name, loaded) in enumerate(models):
        progress(done, len(models), name)
        for rows in splits:
            found = examine(loaded, rows, settings.zero_shot, settings.batch_size)
            metrics[rows.split]["models"][name] = found.metrics
            retrieval.setdefault(name, {})[rows.split] = _queries(found, rows, settings.languages[0])
        speed[name] = {"latency_ms": _latency_ms(loaded, splits[0])}
    progress(len(models), len(models), "")
    write_json(join(uri, METRICS), metrics)
    write_json(join(uri, RETRIEVAL), retrieval)
    write_json(join(uri, SPEED), speed)
    return {"fingerprint": content_hash(metrics), "models": list(packages), "splits": list(settings.splits)}


def metrics_of(evaluation: str, model: str) -> dict[str, float]:
    """One model's metrics of a committed evaluation, by the flat names that gates use."""
    splits: dict[str, Any] = read_json(join(evaluation, METRICS))
    return flatten({split: found["models"][model] for split, found in splits.items()})


def metrics_of_package(package: str, dataset: str, settings: EvaluateConfig) -> dict[str, float]:
    """Another package's metrics on the same rows, by the same flat names: how a champion is put beside a challenger."""
    data = open_dataset(dataset)
    loaded = load_package(read_package(package))
    found: dict[str, Metrics] = {}
    for split in settings.splits:
        rows = read_rows(data, split, settings.languages)
        found[split] = examine(loaded, rows, settings.zero_shot, settings.batch_size).metrics
    return flatten(found)


def _models(packages: Mapping[str, str], seed: int) -> Iterator[tuple[str, LoadedModel]]:
    loaded = {name: load_package(read_package(package)) for name, package in packages.items()}
    yield from loaded.items()
    teacher = next(iter(loaded.values()))
    fresh = build(
        "model",
        teacher.config,
        teacher.tokenizer.get_vocab_size(),
        seed=seed + UNTRAINED_SEED,
        num_classes=len(teacher.classes),
    ).eval()
    yield "untrained", replace(teacher, model=fresh)


def _queries(found: Examination, rows: Rows, language: str) -> list[dict[str, Any]]:
    """Every caption with the pictures that came first for it."""
    samples = [rows.samples[row] for row in rows.rows[language]]
    captions = rows.captions[language]
    return [
        {
            "caption": caption,
            "key": samples[query].key,
            "rank": int(found.ranks[query]),
            "results": [
                {
                    "key": samples[row].key,
                    "caption": captions[row],
                    "score": round(float(score), 4),
                    "correct": bool(row == query),
                }
                for row, score in zip(found.best[query], found.scores[query], strict=True)
            ],
        }
        for query, caption in enumerate(captions)
    ]


def _latency_ms(loaded: LoadedModel, rows: Rows) -> float:
    """Median milliseconds from one stored picture to its embedding."""
    samples = rows.samples[:1]
    times = []
    for _ in range(LATENCY_RUNS):
        began = perf_counter()
        embed_images(loaded, samples, 1)
        times.append(1000 * (perf_counter() - began))
    return round(median(times), 2)
