"""Examines every model of the loop, an untrained one and chance on the same rows, and writes what came out.

What the examinations ask of the models is computed first, by all workers at once, and kept among the workspace's
results; the metrics are computed from these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import MisuseError, MmflowError
from mmflow.core.progress import Report
from mmflow.core.storage import join, read_json, write_json
from mmflow.dataset.opened import open_dataset
from mmflow.evaluation.config import EXAMINATIONS, EvaluateConfig, check_possible, possible, reads_captions
from mmflow.evaluation.examination import (
    DETAILS,
    METRICS,
    SPEED,
    Metrics,
    Outcome,
    Rows,
    Subject,
    flatten,
    read_rows,
)
from mmflow.inference.compute import Request, check_errors, compute
from mmflow.inference.result import Result
from mmflow.inference.runner import Model
from mmflow.models.package import read_config, read_package

LATENCY_RUNS, LATENCY_WARM_UP = 25, 5
THROUGHPUT_ROWS, THROUGHPUT_RUNS = 64, 5
UNTRAINED, UNTRAINED_SEED = "untrained", 1_000_003  # far from the seeds that people choose

Place = tuple[str, str]  # a model's name and a split


def evaluate_models(
    uri: str,
    *,
    dataset: str,
    packages: Mapping[str, str],
    settings: EvaluateConfig,
    seed: int,
    store: str,
    progress: Report,
) -> Mapping[str, Any]:
    """Examine the packages (model → URI) and write metrics, details and speed; returns the manifest's fields. What the
    models say of rows is kept in `store`."""
    models = {name: Model(package=package) for name, package in packages.items()}
    models[UNTRAINED] = Model(package=next(iter(packages.values())), fresh_seed=seed + UNTRAINED_SEED)
    check_possible(settings, {name: read_config(read_package(package)).gives for name, package in packages.items()})
    subjects = prepare(models, dataset, settings, store, progress)
    asked = {name for subject in subjects.values() for name in possible(settings, subject.gives)}
    rows = {split: subject.rows for (_, split), subject in subjects.items()}
    metrics: dict[str, dict[str, Any]] = {
        split: {
            "rows": len(own.samples),
            "left_out": len(own.errors),
            "models": {"chance": chance(own, settings, asked)},
        }
        for split, own in rows.items()
    }
    details: dict[str, dict[str, Any]] = {}
    speed = {}
    for done, (name, split) in enumerate(places := list(subjects)):
        progress(done, len(places), f"{name} on {split}")
        subject = subjects.pop((name, split))  # with what it holds in memory
        is_first = split == settings.splits[0]
        outcome = examine(subject, settings, only_metrics=name == UNTRAINED or not is_first)
        metrics[split]["models"][name] = _without_infinity(outcome.metrics)
        details.setdefault(name, {})[split] = outcome.details
        if name in packages and is_first:
            speed[name] = _speed(subject)
    write_json(join(uri, METRICS), metrics)
    write_json(join(uri, DETAILS), details)
    write_json(join(uri, SPEED), speed)
    progress(len(places), len(places), "")
    return {"fingerprint": content_hash(metrics), "models": list(packages), "splits": list(settings.splits)}


def prepare(
    models: Mapping[str, Model], dataset: str, settings: EvaluateConfig, store: str, progress: Report
) -> dict[Place, Subject]:
    """(model's name, split) → the model and the rows that all models could read, with everything computed that the
    examinations ask for. On Ray where it is initialised.

    Raises MisuseError for what the rows lack, before anything is computed, and MmflowError where more of them fail than
    `max_errors` allows.
    """
    data = open_dataset(dataset)
    splits = {split: read_rows(data, split, settings.languages) for split in settings.splits}
    subjects = {
        (name, split): Subject(model, rows, store, settings.batch_size)
        for name, model in models.items()
        for split, rows in splits.items()
    }
    _check_rows(subjects.values(), settings)
    computed: dict[Place, list[Result]] = {place: [] for place in subjects}
    for asked in (_asked, _asked_then):
        # What is asked then depends on the rows that are left: after others failed, it is something else.
        while missing := {
            place: results
            for place, subject in subjects.items()
            if (results := [result for result in asked(subject, settings) if result not in computed[place]])
        }:
            compute(
                [
                    Request(model=models[name], dataset=dataset, split=split, results=tuple(results))
                    for (name, split), results in missing.items()
                ],
                store,
                batch_size=settings.batch_size,
                pool=settings,
                max_errors=settings.max_errors,
                progress=progress,
            )
            for place, results in missing.items():
                computed[place] += results
            subjects = _without_failed(subjects, computed, settings.max_errors)
    return subjects


def _check_rows(subjects: Iterable[Subject], settings: EvaluateConfig) -> None:
    """Raise MisuseError for a split without what its examinations read."""
    for subject in subjects:
        rows = subject.rows
        where = f"split {rows.split!r} of {rows.reader.dataset.uri}"
        if not rows.samples:
            raise MisuseError(f"evaluate.splits: no sample that can be read in {where}")
        if reads_captions(settings, [subject.gives]):
            for language, captions in rows.captions.items():
                if not captions.texts:
                    raise MisuseError(f"evaluate.languages: no caption in {language!r} in {where}")
        for name in possible(settings, subject.gives):
            EXAMINATIONS[name].check_rows(rows)


def _asked(subject: Subject, settings: EvaluateConfig) -> Iterable[Result]:
    languages, gives = list(subject.rows.captions), subject.gives
    return _unique(
        result
        for name in possible(settings, gives)
        for result in EXAMINATIONS[name].asks(settings.named.get(name), languages, gives)
    )


def _asked_then(subject: Subject, settings: EvaluateConfig) -> Iterable[Result]:
    return _unique(
        result
        for name in possible(settings, subject.gives)
        for result in EXAMINATIONS[name].asks_then(subject, settings.named.get(name))
    )


def _unique(results: Iterable[Result]) -> Iterable[Result]:
    return dict.fromkeys(results)


def _without_failed(
    subjects: Mapping[Place, Subject], computed: Mapping[Place, Sequence[Result]], max_errors: float
) -> dict[Place, Subject]:
    """The subjects without the rows that have an error in a result of any of the models. Raises MmflowError where they
    are too many, whether they failed now or in an earlier evaluation."""
    splits = {split: subject.rows for (_, split), subject in subjects.items()}
    failed: dict[str, dict[int, str]] = {split: {} for split in splits}
    for (name, split), subject in subjects.items():
        for result in computed[name, split]:
            errors = subject.column(result, "error")
            places = np.flatnonzero(pc.is_valid(errors).to_numpy())
            failed[split] |= zip(places.tolist(), errors.take(pa.array(places)).to_pylist(), strict=True)
    left = {split: rows.without(failed[split]) if failed[split] else rows for split, rows in splits.items()}
    for split, rows in left.items():
        if rows.errors:
            check_errors(len(rows.errors), len(rows.reader), f"{split}, {rows.errors[0]}", max_errors)
        if not rows.samples:
            raise MmflowError(f"evaluate.splits: every row of split {split!r} failed, the first: {rows.errors[0]}")
    return {
        (name, split): replace(subject, rows=left[split]) if failed[split] else subject
        for (name, split), subject in subjects.items()
    }


def examine(subject: Subject, settings: EvaluateConfig, *, only_metrics: bool = False) -> Outcome:
    """Every examination that the recipe asks for and that fits the model, on one split."""
    whole = Outcome()
    for name in possible(settings, subject.gives):
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


def metrics_of_package(
    package: str, dataset: str, settings: EvaluateConfig, store: str, progress: Report
) -> dict[str, float]:
    """Another package's metrics on the same rows, by the same flat names: a champion's beside a challenger's."""
    subjects = prepare({"champion": Model(package=package)}, dataset, settings, store, progress)
    return flatten(
        {split: examine(subject, settings, only_metrics=True).metrics for (_, split), subject in subjects.items()}
    )


def _without_infinity(metrics: Any) -> Any:
    # JSON has no infinity, which is the perplexity of a model that is sure of the wrong word.
    if isinstance(metrics, Mapping):
        return {name: _without_infinity(value) for name, value in metrics.items()}
    return metrics if math.isfinite(metrics) else None


@torch.inference_mode()
def _speed(subject: Subject) -> dict[str, float]:
    """Median milliseconds from one stored picture to its embedding (or encoding, without a shared space), and pictures
    per second through the image encoder, many at once and decoded before."""
    predictor, times = subject.predictor, []
    samples = [subject.rows.with_picture(row) for row in range(min(THROUGHPUT_ROWS, len(subject.rows.samples)))]
    for _ in range(LATENCY_WARM_UP + LATENCY_RUNS):
        began = perf_counter()
        image, _ = predictor.encode(samples[:1])
        if "embeddings" in predictor.gives:
            predictor.model.embed_image(image)
        times.append(1000 * (perf_counter() - began))
    latency_ms = median(times[LATENCY_WARM_UP:])
    inputs, times = predictor.image_inputs(samples), []
    for _ in range(1 + THROUGHPUT_RUNS):
        began = perf_counter()
        predictor.model.encode_image(*inputs)
        times.append(perf_counter() - began)
    pictures_per_second = len(samples) / median(times[1:])
    return {"latency_ms": round(latency_ms, 2), "pictures_per_second": round(pictures_per_second, 1)}
