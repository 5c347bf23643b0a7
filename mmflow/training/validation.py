"""The best that a validated metric has been, and when there is no more waiting for better."""

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

from mmflow.learning.config import ObjectivesConfig
from mmflow.learning.retrieval import BLOCK, Found, ranks_of_right, retrieval_metrics
from mmflow.learning.rows import gather_rows
from mmflow.loading.batches import Batch
from mmflow.loading.loader import START, Loader
from mmflow.loading.plan import num_steps
from mmflow.training.config import VALIDATION, ValidationConfig
from mmflow.training.engine import Buffers, average_buffers, random_state, set_random_state
from mmflow.training.journal import Journal
from mmflow.training.metrics import as_written
from mmflow.training.optimizers import averages_in_place


class Best:
    """Of one training, the same on every rank. A value is better by `least_gain` or not at all: small gains in a row
    count once they add up to it."""

    def __init__(
        self,
        metric: str,
        *,
        highest: bool,
        least_gain: float = 0.0,
        patience: int | None = None,
    ) -> None:
        self._metric, self._sign = metric, 1.0 if highest else -1.0
        self._least_gain, self._patience = least_gain, patience
        self._value: float | None = None
        self._step = 0
        self._since = 0  # validations

    def look(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether a validation is the best so far. One without the metric counts for nothing."""
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
        """Why the training ends, in words; None where it goes on."""
        if self._patience is None or self._since < self._patience:
            return None
        by = f" by {self._least_gain:g}" if self._least_gain else ""
        than = "" if self._value is None else f" than {self._value:.6g} at step {self._step}"
        return f"no better {self._metric}{than}{by} in {self._since} validations"

    def state(self) -> dict[str, Any]:
        """What a restart must know of it, as JSON."""
        return {"metric": self._metric, "value": self._value, "step": self._step, "since": self._since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; from none where it is of another metric."""
        if state.get("metric") == self._metric:
            self._value, self._step, self._since = state["value"], state["step"], state["since"]


DIRECTIONS = ("text_to_image", "image_to_text")
RECALL_AT = (1, 5)
ROUNDING = 1e-6  # of a cosine: a caption that two samples share must be a tie on any number of ranks


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a task is examined on."""

    task: int = 0
    name: str = ""  # before its metrics, where there are several tasks
    share: float = 1.0  # of `validation/loss`
    loader: Loader  # of the split, from its beginning on and without augmentation
    objectives: ObjectivesConfig


def validation_metrics(objectives: Mapping[str, Collection[str]], gives: Collection[str]) -> list[str]:
    """What a validation writes of a model that gives this and learns these objectives, by the tasks' names."""
    recalls = [f"{direction}/R@{k}" for direction in DIRECTIONS for k in RECALL_AT] if "embeddings" in gives else []
    names = [_path(task, name) for task, own in objectives.items() for name in ("loss", *own, *recalls)]
    return list(dict.fromkeys([_path("", "loss"), *names]))


def _path(task: str, name: str) -> str:
    return f"{VALIDATION}{task}/{name}" if task else VALIDATION + name


class Validation:
    """A training's validations as one rank does its part of them. Every rank calls `look`, in step."""

    def __init__(
        self,
        config: ValidationConfig,
        held_out: Sequence[HeldOut],
        best: Best,
        *,
        keeps_best: bool,
        averaged: bool,
        last_step: int,
    ) -> None:
        """`averaged` where the engine keeps running averages of weights. Losses weigh what they do at the training's
        last step, so that one validation compares with another."""
        self._config, self._held_out = config, held_out
        self._keeps_best, self._averaged, self._last_step = keeps_best, averaged, last_step
        self.best = best
        self.examined = 0  # the last step that there was one after, if it was cut or not

    def is_due(self, step: int) -> bool:
        """Whether there is one after a step."""
        return step % self._config.every_steps == 0 or step == self._last_step

    def look(self, engine: Any, step: int, journal: Journal | None) -> tuple[dict[str, float], bool]:
        """The metrics of a validation, by the names of `validation_metrics`, and whether a checkpoint is wanted because
        it is the best yet. One that took too long is cut: it has none, and the journal says so. Collective."""
        began, self.examined = time.monotonic(), step
        drawn, buffers = random_state(engine.device), Buffers(engine.module)
        average_buffers(engine.module)
        engine.eval()
        metrics: dict[str, float] = {}
        is_cut = False
        weights = averages_in_place(engine) if self._averaged else contextlib.nullcontext()
        with weights, torch.no_grad(), as_written(engine.module):
            for each in self._held_out:
                found, is_cut = self._examine(engine, each, began)
                if is_cut:
                    break
                metrics |= {_path(each.name, name): value for name, value in found.items()}
        engine.train()
        buffers.bring_back()
        set_random_state(engine.device, drawn)
        seconds = time.monotonic() - began
        if is_cut:
            if journal:
                reason = f"validation.max_seconds: {self._config.max_seconds:g} were used up"
                journal.event(step, "validation_cut", reason=reason, seconds=seconds)
            return {}, False
        whole = sum(each.share for each in self._held_out)
        losses = [each.share * metrics[_path(each.name, "loss")] for each in self._held_out]
        metrics[_path("", "loss")] = sum(losses) / whole
        if journal:
            journal.metrics(step, {**metrics, f"{VALIDATION}seconds": seconds})
        return metrics, self.best.look(step, metrics) and self._keeps_best

    def _examine(self, engine: Any, held_out: HeldOut, began: float) -> tuple[dict[str, float], bool]:
        """The metrics of a task, and whether time was too short for them."""
        loader = held_out.loader
        size = loader.order.global_batch_size
        num_samples = min(self._config.max_samples, sum(shard.samples for shard in loader.readers[0].shards))
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
                is_late = time.monotonic() - began > self._config.max_seconds and number + 1 < num_batches
                *means, real, late = _summed([*parts.values(), batch.real.sum(), torch.tensor(is_late)], engine.device)
                if late:
                    return {}, True
                for name, mean in zip(parts, means, strict=True):
                    sums[name] = sums.get(name, 0.0) + real * mean / dist.get_world_size()
                num_real += real
        losses = {name: value / max(1.0, num_real) for name, value in sums.items()}
        sections = held_out.objectives.named
        loss = sum(section.weight_at(self._last_step) * losses[name] for name, section in sections.items())
        recalls = _recalls(*(torch.cat(each) for each in zip(*embedded, strict=True))) if embedded else {}
        return {"loss": loss, **losses, **recalls}, False


def _first(batch: Batch, count: int) -> Batch:
    """The batch with no more than the first rows of the global one as real ones."""
    num_rows = len(batch.real)
    places_B = dist.get_rank() * num_rows + torch.arange(num_rows, device=batch.real.device)
    return replace(batch, real=batch.real & (places_B < count))


def _summed(values: Sequence[Tensor], device: torch.device) -> list[float]:
    """Numbers of this rank, () each, summed over ranks."""
    sums = torch.stack([each.to(device).double().reshape(()) for each in values])
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def _recalls(image_BE: Tensor, text_BE: Tensor, real_B: Tensor) -> dict[str, float]:
    """How often a caption finds its picture among the samples of all ranks, and a picture its caption. Collective."""
    real_N = gather_rows(real_B.to(torch.uint8)).bool()
    image_NE, text_NE = gather_rows(image_BE.float())[real_N], gather_rows(text_BE.float())[real_N]
    mine_Q = torch.arange(dist.get_rank(), len(image_NE), dist.get_world_size(), device=image_NE.device)
    metrics: dict[str, float] = {}
    both_ways = (text_NE, image_NE), (image_NE, text_NE)
    for direction, (queries_NE, candidates_NE) in zip(DIRECTIONS, both_ways, strict=True):
        found = [np.zeros(0, np.int64)]
        for right_Q in torch.split(mine_Q, BLOCK):
            similarity_QN = queries_NE[right_Q] @ candidates_NE.T
            similarity_QN[torch.arange(len(right_Q)), right_Q] -= ROUNDING
            found.append(ranks_of_right(similarity_QN.cpu().numpy(), right_Q.cpu().numpy()))
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, np.concatenate(found))
        ranks = np.concatenate(of_ranks)
        recalls = retrieval_metrics(Found(ranks, 1 / ranks), RECALL_AT)
        metrics |= {f"{direction}/R@{k}": recalls[f"R@{k}"] for k in RECALL_AT}
    return metrics
