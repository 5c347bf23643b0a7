"""Examines every model of the loop, an untrained one and chance on the same rows, and writes what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from mmflow.core.artifacts import content_hash
from mmflow.core.progress import Report
from mmflow.core.storage import join, read_json, write_json
from mmflow.dataset.opened import open_dataset
from mmflow.evaluation.config import EXAMINATIONS, EvaluateConfig, check_possible, possible, reads_captions
from mmflow.evaluation.examination import (
    DETAILS,
    METRICS,
    SPEED,
    Gives,
    Metrics,
    Outcome,
    Rows,
    Subject,
    flatten,
    read_rows,
)
from mmflow.inference.predict import Predictor
from mmflow.models.model import build
from mmflow.models.package import LoadedModel, load_package, read_package

LATENCY_RUNS, LATENCY_WARM_UP = 25, 5
THROUGHPUT_ROWS, THROUGHPUT_RUNS = 64, 5
UNTRAINED, UNTRAINED_SEED = "untrained", 1_000_003  # far from the seeds that people choose


def evaluate_models(
    uri: str,
    *,
    dataset: str,
    packages: Mapping[str, str],
    settings: EvaluateConfig,
    seed: int,
    progress: Report,
) -> Mapping[str, Any]:
    """Examine the packages (model → URI) and write metrics, details and speed; returns the manifest's fields."""
    models = _load(packages, settings, seed)
    check_possible(settings, {name: models[name].gives for name in packages})
    gives = [model.gives for model in models.values()]
    splits = _read_splits(dataset, settings, gives)
    asked = {name for model in gives for name in possible(settings, model)}
    metrics: dict[str, dict[str, Any]] = {
        rows.split: {"rows": len(rows.samples), "models": {"chance": chance(rows, settings, asked)}} for rows in splits
    }
    details: dict[str, dict[str, Any]] = {}
    speed = {}
    for done, (name, model) in enumerate(models.items()):
        progress(done, len(models), name)
        for rows in splits:
            only_metrics = name == UNTRAINED or rows is not splits[0]
            outcome = examine(model, rows, settings, only_metrics=only_metrics)
            metrics[rows.split]["models"][name] = _without_infinity(outcome.metrics)
            details.setdefault(name, {})[rows.split] = outcome.details
        speed[name] = _speed(model, splits[0])
    progress(len(models), len(models), "")
    write_json(join(uri, METRICS), metrics)
    write_json(join(uri, DETAILS), details)
    write_json(join(uri, SPEED), speed)
    return {"fingerprint": content_hash(metrics), "models": list(packages), "splits": list(settings.splits)}


def examine(model: Predictor, rows: Rows, settings: EvaluateConfig, *, only_metrics: bool = False) -> Outcome:
    """Every examination that the recipe asks for and that fits the model, on one split."""
    subject, whole = Subject(model, rows), Outcome()
    for name in possible(settings, model.gives):
        if EXAMINATIONS[name].measures or not only_metrics:
            outcome = EXAMINATIONS[name].examine(subject, settings.named.get(name))
            whole.metrics.update(outcome.metrics)
            whole.details.update(outcome.details)
    return whole


def chance(rows: Rows, settings: EvaluateConfig, asked: Sequence[str] | set[str]) -> Metrics:
    """What guessing, the commonest class or answer, or one typical caption for all reaches on the same rows."""
    metrics: Metrics = {}
    for name in asked:
        metrics |= EXAMINATIONS[name].chance(rows, settings.named.get(name))
    return metrics


def metrics_of(evaluation: str, model: str) -> dict[str, float]:
    """One model's metrics of a committed evaluation, by the flat names that gates use."""
    splits: dict[str, Any] = read_json(join(evaluation, METRICS))
    return flatten({split: entry["models"][model] for split, entry in splits.items()})


def metrics_of_package(package: str, dataset: str, settings: EvaluateConfig) -> dict[str, float]:
    """Another package's metrics on the same rows, by the same flat names: a champion's beside a challenger's."""
    model = Predictor(load_package(read_package(package)), settings.batch_size)
    splits = _read_splits(dataset, settings, [model.gives])
    return flatten({rows.split: examine(model, rows, settings, only_metrics=True).metrics for rows in splits})


def _read_splits(dataset: str, settings: EvaluateConfig, gives: Sequence[Gives]) -> list[Rows]:
    data, captions = open_dataset(dataset), reads_captions(settings, gives)
    return [read_rows(data, split, settings.languages, captions=captions) for split in settings.splits]


def _load(packages: Mapping[str, str], settings: EvaluateConfig, seed: int) -> dict[str, Predictor]:
    """The packages' models, and one like the first with fresh weights."""
    loaded: dict[str, LoadedModel] = {name: load_package(read_package(uri)) for name, uri in packages.items()}
    first = next(iter(loaded.values()))
    fresh = build(
        "model",
        first.config,
        first.tokenizer.get_vocab_size(),
        seed=seed + UNTRAINED_SEED,
        num_classes=len(first.classes),
    )
    loaded[UNTRAINED] = replace(first, model=fresh.eval())
    return {name: Predictor(model, settings.batch_size) for name, model in loaded.items()}


def _without_infinity(metrics: Any) -> Any:
    # JSON has no infinity, which is the perplexity of a model that is sure of the wrong word.
    if isinstance(metrics, Mapping):
        return {name: _without_infinity(value) for name, value in metrics.items()}
    return metrics if math.isfinite(metrics) else None


@torch.inference_mode()
def _speed(predictor: Predictor, rows: Rows) -> dict[str, float]:
    """Median milliseconds from one stored picture to its embedding (or encoding, without a shared space), and pictures
    per second through the image encoder, many at once and decoded before."""
    model, times = predictor.model, []
    for _ in range(LATENCY_WARM_UP + LATENCY_RUNS):
        began = perf_counter()
        image, _ = predictor.encode(rows.samples[:1])
        if "embeddings" in predictor.gives:
            model.embed_image(image)
        times.append(1000 * (perf_counter() - began))
    latency_ms = median(times[LATENCY_WARM_UP:])
    samples, times = rows.samples[:THROUGHPUT_ROWS], []
    inputs = predictor.image_inputs(samples)
    for _ in range(1 + THROUGHPUT_RUNS):
        began = perf_counter()
        model.encode_image(*inputs)
        times.append(perf_counter() - began)
    pictures_per_second = len(samples) / median(times[1:])
    return {"latency_ms": round(latency_ms, 2), "pictures_per_second": round(pictures_per_second, 1)}
