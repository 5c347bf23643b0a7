"""Stage `evaluate`: every model of the loop, an untrained one and chance, on the same rows, written as one artifact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from mmflow.core.artifacts import content_hash
from mmflow.core.progress import Report
from mmflow.core.storage import join, read_json, write_json
from mmflow.dataset.opened import open_dataset
from mmflow.evaluation.asked import COMPARES, asked_and_given, check_asked, reads_captions
from mmflow.evaluation.attention import look
from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.evaluate import (
    Metrics,
    Retrieved,
    chance,
    examine,
    flatten,
)
from mmflow.evaluation.rows import Captions, Rows, read_rows
from mmflow.inference.embed import image_inputs
from mmflow.models.model import build
from mmflow.models.package import LoadedModel, load_package, read_package

METRICS = "metrics.json"  # {split: {"rows", "models": {model: metrics}}}
RETRIEVAL = "retrieval.json"  # {model: {split: [query, …]}}, of models with a shared space
DETAILS = "details.json"  # {model: {split: {"captions", "answers", "confusion"}}}, where they were asked for
ATTENTION = "attention.json"  # {model: [{"key", "caption", …}]}, where it was asked for
# {model: {"latency_ms", "pictures_per_second"}}: not part of the fingerprint, because it is never the same twice
SPEED = "speed.json"
LATENCY_RUNS = 25
THROUGHPUT_ROWS, THROUGHPUT_RUNS = 64, 5
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
    models = list(_models(packages, seed))
    check_asked(settings, {name: loaded.model.gives for name, loaded in models if name in packages})
    gives = [loaded.model.gives for _, loaded in models]
    sections = frozenset[str]().union(*(asked_and_given(settings, each) for each in gives))
    splits = _read_splits(dataset, settings, gives)
    metrics: dict[str, dict[str, Any]] = {
        rows.split: {"rows": len(rows.samples), "models": {"chance": chance(rows, settings, sections)}}
        for rows in splits
    }
    retrieval: dict[str, dict[str, Any]] = {}
    details: dict[str, dict[str, Any]] = {}
    speed = {}
    for done, (name, loaded) in enumerate(models):
        progress(done, len(models), name)
        for rows in splits:
            found = examine(loaded, rows, settings)
            metrics[rows.split]["models"][name] = _writable(found.metrics)
            if found.retrieved is not None:
                captions = rows.captions[settings.languages[0]]
                retrieval.setdefault(name, {})[rows.split] = _queries(found.retrieved, rows, captions)
            if found.details:
                details.setdefault(name, {})[rows.split] = found.details
        speed[name] = {
            "latency_ms": _latency_ms(loaded, splits[0]),
            "pictures_per_second": _pictures_per_second(loaded, splits[0]),
        }
    progress(len(models), len(models), "")
    write_json(join(uri, METRICS), metrics)
    write_json(join(uri, RETRIEVAL), retrieval)
    write_json(join(uri, DETAILS), details)
    write_json(join(uri, ATTENTION), _looks(dict(models), packages, splits[0], settings))
    write_json(join(uri, SPEED), speed)
    return {"fingerprint": content_hash(metrics), "models": list(packages), "splits": list(settings.splits)}


def metrics_of(evaluation: str, model: str) -> dict[str, float]:
    """One model's metrics of a committed evaluation, by the flat names that gates use."""
    splits: dict[str, Any] = read_json(join(evaluation, METRICS))
    return flatten({split: found["models"][model] for split, found in splits.items()})


def metrics_of_package(package: str, dataset: str, settings: EvaluateConfig) -> dict[str, float]:
    """Another package's metrics on the same rows, by the same flat names: how a champion is put beside a challenger."""
    loaded = load_package(read_package(package))
    found: dict[str, Metrics] = {}
    for rows in _read_splits(dataset, settings, [loaded.model.gives]):
        found[rows.split] = examine(loaded, rows, settings).metrics
    return flatten(found)


def _read_splits(dataset: str, settings: EvaluateConfig, gives: Sequence[frozenset[str]]) -> list[Rows]:
    data = open_dataset(dataset)
    captions = any(reads_captions(settings, each) for each in gives)
    return [read_rows(data, split, settings.languages, captions=captions) for split in settings.splits]


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


def _writable(metrics: Any) -> Any:
    # JSON has no infinity, which the perplexity of a model that is sure of the wrong word can be.
    if isinstance(metrics, Mapping):
        return {name: _writable(value) for name, value in metrics.items()}
    return metrics if math.isfinite(metrics) else None


def _queries(found: Retrieved, rows: Rows, captions: Captions) -> list[dict[str, Any]]:
    """Every caption with the pictures that came first for it."""
    samples = [rows.samples[row] for row in captions.pictures]
    return [
        {
            "caption": caption,
            "key": samples[right].key,
            "rank": int(found.ranks[query]),
            "results": [
                {
                    "key": samples[picture].key,
                    "caption": captions.texts_of_picture[picture][0],
                    "score": round(float(score), 4),
                    "correct": bool(picture == right),
                }
                for picture, score in zip(found.best[query], found.scores[query], strict=True)
            ],
        }
        for query, (caption, right) in enumerate(zip(captions.texts, captions.picture_of_text, strict=True))
    ]


def _looks(
    models: Mapping[str, LoadedModel], names: Mapping[str, str], rows: Rows, settings: EvaluateConfig
) -> dict[str, list[dict[str, Any]]]:
    """What each trained model looked at in some pictures with their own first captions."""
    if settings.attention is None:
        return {}
    captions = rows.captions[settings.languages[0]]
    shown = min(settings.attention.rows, len(captions.pictures))
    places = [number * len(captions.pictures) // shown for number in range(shown)]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        if models[name].model.gives & COMPARES:
            found[name] = []
            for place in places:
                sample, caption = rows.samples[captions.pictures[place]], captions.texts_of_picture[place][0]
                looked = look(models[name], sample, caption)
                found[name].append(
                    {
                        "key": sample.key,
                        "caption": caption,
                        "score": round(looked.score, 4),
                        "picture": looked.picture,
                        "rollout": looked.rollout,
                        "tokens": [{"text": piece, "weight": weight} for piece, weight in looked.tokens],
                    }
                )
    return found


@torch.inference_mode()
def _latency_ms(loaded: LoadedModel, rows: Rows) -> float:
    """Median milliseconds from one stored picture to what the image encoder makes of it, in the shared space where
    there is one."""
    samples, model = rows.samples[:1], loaded.model
    times = []
    for _ in range(LATENCY_RUNS):
        began = perf_counter()
        image = model.encode_image(*image_inputs(loaded, samples))
        if "embeddings" in model.gives:
            model.embed_image(image)
        times.append(1000 * (perf_counter() - began))
    return round(median(times), 2)


@torch.inference_mode()
def _pictures_per_second(loaded: LoadedModel, rows: Rows) -> float:
    """Pictures through the image encoder, many at once and decoded before; the median of a few runs."""
    samples = rows.samples[:THROUGHPUT_ROWS]
    inputs = image_inputs(loaded, samples)
    times = []
    for _ in range(THROUGHPUT_RUNS):
        began = perf_counter()
        loaded.model.encode_image(*inputs)
        times.append(perf_counter() - began)
    return round(len(samples) / median(times), 1)
