"""Validation during a training: losses and retrieval on held-out samples, the same on any number of ranks.

It uses the weights that would be packaged: their running averages where the recipe keeps them (`ema_decay`). Afterwards
weights, random states and running statistics are as before, and its loaders are not the training's.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.retrieval import retrieval_metrics
from mmflow.learning.rows import gather_rows
from mmflow.learning.tiled_ranks import Share, ranks_both_ways
from mmflow.loading.batches import Batch
from mmflow.loading.loader import START, Loader
from mmflow.loading.plan import num_steps
from mmflow.training.config import VALIDATION, CheckpointsConfig, ValidationConfig
from mmflow.training.engine import Buffers, average_buffers, random_state, set_random_state
from mmflow.training.journal import Journal
from mmflow.training.metrics import uncompiled
from mmflow.training.optimizers import averages_in_place

# Shapes: B rows of this rank, N samples of all ranks, E the width of the shared space.

DIRECTIONS = ("text_to_image", "image_to_text")
RECALL_AT = (1, 5)
ROUNDING = 1e-6  # of a cosine: a caption that two samples share must be a tie on any number of ranks


class Best:
    """The best value of `best_metric` so far, and when to stop waiting for a better one; the same on every rank.

    A value must be better than the best by `least_gain`: small gains in a row count once they add up to it.
    """

    def __init__(self, checkpoints: CheckpointsConfig, validation: ValidationConfig) -> None:
        self._metric, self._sign = checkpoints.best_metric, 1.0 if checkpoints.best_is_highest else -1.0
        self._least_gain, self._patience = validation.least_gain, validation.patience
        self._value: float | None = None
        self._step = 0
        self._since = 0  # validations

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether a validation is the best so far. One without the metric does not count."""
        if self._metric not in metrics:
            return False
        value = metrics[self._metric]
        gain = math.inf if self._value is None else self._sign * (value - self._value)
        if math.isfinite(value) and gain > 0 and gain >= self._least_gain:
            self._value, self._step, self._since = value, step, 0
            return True
        self._since += 1
        return False

    @property
    def ended(self) -> str | None:
        """Why the training ends, in words; None while it continues."""
        if self._patience is None or self._since < self._patience:
            return None
        by = f" by {self._least_gain:g}" if self._least_gain else ""
        than = "" if self._value is None else f" than {self._value:.6g} at step {self._step}"
        return f"no better {self._metric}{than}{by} in {self._since} validations"

    def state(self) -> dict[str, Any]:
        """What a restart must know, as JSON."""
        return {"metric": self._metric, "value": self._value, "step": self._step, "since": self._since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state, unless it is about another metric."""
        if state.get("metric") == self._metric:
            self._value, self._step, self._since = state["value"], state["step"], state["since"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A task's held-out samples."""

    task: int = 0
    name: str = ""  # before its metrics; empty for a single task
    share: float = 1.0  # of `validation/loss`
    loader: Loader  # of the split, from its beginning and without augmentation
    objectives: ObjectivesConfig


def validation_metrics(objectives: Mapping[str, Collection[str]], gives: Collection[str]) -> list[str]:
    """The names of the metrics of a model with these outputs that learns these objectives, by task name."""
    recalls = [f"{direction}/R@{k}" for direction in DIRECTIONS for k in RECALL_AT] if "embeddings" in gives else []
    names = [_path(task, name) for task, own in objectives.items() for name in ("loss", *own, *recalls)]
    return list(dict.fromkeys([_path("", "loss"), *names]))


def _path(task: str, name: str) -> str:
    return f"{VALIDATION}{task}/{name}" if task else VALIDATION + name


@dataclass(kw_only=True)
class Validation:
    """A training's validations as one rank takes part in them."""

    config: ValidationConfig
    held_out: Sequence[HeldOut]
    best: Best
    keeps_best: bool
    averaged: bool  # the engine keeps running averages of weights
    last_step: int
    """Losses have the weights of this step, so that validations can be compared."""
    examined: int = 0
    """The last step that was validated, even if it was cut short."""

    def is_due(self, step: int) -> bool:
        """Whether a validation follows a step."""
        return step % self.config.every_steps == 0 or step == self.last_step

    def run(self, engine: Any, step: int, journal: Journal) -> tuple[dict[str, float], bool]:
        """A validation's metrics, by the names of `validation_metrics`, and whether a checkpoint should be kept because
        it is the best so far. One that takes too long is cut short: it has no metrics. Collective."""
        began, self.examined = time.monotonic(), step
        random, buffers = random_state(engine.device), Buffers(engine.module)
        average_buffers(engine.module)
        engine.eval()
        metrics: dict[str, float] = {}
        is_cut = False
        weights = averages_in_place(engine) if self.averaged else contextlib.nullcontext()
        with weights, torch.no_grad(), uncompiled(engine.module):
            for held_out in self.held_out:
                task_metrics = self._examine(engine, held_out, began)
                if is_cut := task_metrics is None:
                    break
                metrics |= {_path(held_out.name, name): value for name, value in task_metrics.items()}
        engine.train()
        buffers.restore()
        set_random_state(engine.device, random)
        seconds = time.monotonic() - began
        if is_cut:
            reason = f"validation.max_seconds: {self.config.max_seconds:g} were used up"
            journal.event(step, "validation_cut", reason=reason, seconds=seconds)
            return {}, False
        whole = sum(held_out.share for held_out in self.held_out)
        losses = [held_out.share * metrics[_path(held_out.name, "loss")] for held_out in self.held_out]
        metrics[_path("", "loss")] = sum(losses) / whole
        journal.metrics(step, {**metrics, f"{VALIDATION}seconds": seconds})
        return metrics, self.best.update(step, metrics) and self.keeps_best

    def _examine(self, engine: Any, held_out: HeldOut, began: float) -> dict[str, float] | None:
        """A task's metrics; None where there was not enough time for them."""
        loader = held_out.loader
        size = loader.order.global_batch_size
        num_samples = min(self.config.max_samples, sum(shard.samples for shard in loader.readers[0].shards))
        num_batches = num_steps(num_samples, size)
        embedded: list[tuple[Tensor, Tensor, Tensor]] = []
        sums: dict[str, float] = {}
        num_real = 0.0
        loader.state = START
        with contextlib.closing(iter(loader)) as batches:
            for number in range(num_batches):
                batch = replace(_first(next(batches), num_samples - number * size), task=held_out.task)
                _, parts = engine(batch, number, examined=True)
                if "image_embedding" in parts:
                    embedded.append((parts.pop("image_embedding"), parts.pop("text_embedding"), batch.real))
                is_late = time.monotonic() - began > self.config.max_seconds and number + 1 < num_batches
                *means, real, late = _summed([*parts.values(), batch.real.sum(), torch.tensor(is_late)], engine.device)
                if late:
                    return None
                for name, mean in zip(parts, means, strict=True):
                    sums[name] = sums.get(name, 0.0) + real * mean / dist.get_world_size()
                num_real += real
        losses = {name: value / max(1.0, num_real) for name, value in sums.items()}
        sections = held_out.objectives.named
        loss = sum(section.weight_at(self.last_step) * losses[name] for name, section in sections.items())
        recalls = _recalls(*(torch.cat(tensors) for tensors in zip(*embedded, strict=True))) if embedded else {}
        return {"loss": loss, **losses, **recalls}


def _first(batch: Batch, count: int) -> Batch:
    """The batch with only the first rows of the global batch marked as real."""
    num_rows = len(batch.real)
    places_B = dist.get_rank() * num_rows + torch.arange(num_rows, device=batch.real.device)
    return replace(batch, real=batch.real & (places_B < count))


def _summed(values: Sequence[Tensor], device: torch.device) -> list[float]:
    """Numbers of this rank, () each, summed over ranks."""
    sums = torch.stack([value.to(device).double().reshape(()) for value in values])
    dist.all_reduce(sums)
    numbers: list[float] = sums.tolist()
    return numbers


def _recalls(image_BE: Tensor, text_BE: Tensor, real_B: Tensor) -> dict[str, float]:
    """How often a caption finds its image among the samples of all ranks, and an image its caption. Collective."""
    real_N = gather_rows(real_B.to(torch.uint8)).bool()
    image_NE, text_NE = gather_rows(image_BE.float())[real_N], gather_rows(text_BE.float())[real_N]
    share = Share(dist.get_rank(), dist.get_world_size(), _summed_over_ranks)
    found = ranks_both_ways(text_NE, image_NE, np.arange(len(image_NE)), rounding=ROUNDING, share=share)
    metrics: dict[str, float] = {}
    for direction, queries in zip(DIRECTIONS, (found.text_to_image, found.image_to_text), strict=True):
        recalls = retrieval_metrics(queries, RECALL_AT)
        metrics |= {f"{direction}/R@{k}": recalls[f"R@{k}"] for k in RECALL_AT}
    return metrics


def _summed_over_ranks(part: Tensor) -> Tensor:
    dist.all_reduce(part)
    return part
