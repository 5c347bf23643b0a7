"""The training loop: batches in, steps out. It knows DeepSpeed's engine and nothing of Ray, MLflow or Dagster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.errors import TrainingError
from mmflow.loading.batches import Batch, LoaderState
from mmflow.training.telemetry import Journal

Losses = Callable[[Any, Batch], tuple[Tensor, Mapping[str, Tensor]]]
"""(engine, batch) → the loss to descend, (), and the parts to report by name."""


def train(
    engine: Any,
    source: Iterator[Batch],
    losses: Losses,
    *,
    first_step: int,
    total_steps: int,
    log_every: int,
    checkpoint_every: int,
    save: Callable[[int, LoaderState], None],
    journal: Journal | None,
) -> None:
    """Run steps `first_step` … `total_steps`, saving every `checkpoint_every`. Every rank calls it; rank 0 has a journal.

    An interval of the journal also ends at each checkpoint: so a resumed run writes the same lines as one that was never
    stopped, and no checkpoint is saved that was not looked at. Raises TrainingError when the mean loss of an interval,
    or its last gradient, is not finite.
    """
    engine.train()
    interval = _Interval()
    for step in range(first_step + 1, total_steps + 1):
        began = time.perf_counter()
        batch = next(source)
        interval.waited += time.perf_counter() - began
        loss, parts = losses(engine, batch)
        engine.backward(loss)
        engine.step()
        interval.add(loss, parts, batch)
        checkpoint_due = step % checkpoint_every == 0 and step < total_steps
        if step % log_every == 0 or step == total_steps or checkpoint_due:
            metrics = interval.close()
            metrics["learning_rate"] = engine.get_lr()[0]
            metrics["gradient_norm"] = float(engine.get_global_grad_norm() or 0.0)
            metrics["skipped_steps"] = float(engine.skipped_steps)
            if journal:
                journal.metrics(step, metrics)
            # Both are of all ranks, so every rank raises. DeepSpeed tells a norm that is not finite as -1.
            if not math.isfinite(metrics["loss"]) or not 0 <= metrics["gradient_norm"] < math.inf:
                raise TrainingError(
                    f"step {step}: the loss is {metrics['loss']}, the gradient's norm {metrics['gradient_norm']}; lower "
                    f"learning_rate, or look at the samples of epoch {batch.state.epoch} before position "
                    f"{batch.state.position}"
                )
            interval = _Interval()
        if checkpoint_due:
            save(step, batch.state)
            if journal:
                journal.event(step, "checkpoint", epoch=batch.state.epoch, position=batch.state.position)


class _Interval:
    """Sums over the steps between two lines of the journal; exchanged between ranks once, at its end."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, parts: Mapping[str, Tensor], batch: Batch) -> None:
        self.steps += 1
        tokens = batch.token_mask[batch.real].sum()
        counts = {"samples": batch.real.sum(), "tokens": tokens, "slots": torch.tensor(batch.token_mask.numel())}
        for name, value in {"loss": loss, **parts, **counts}.items():
            value = value.detach().double().reshape(())
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def close(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        device = self.sums["loss"].device
        sums = torch.stack([value.to(device) for value in self.sums.values()])
        dist.all_reduce(sums)
        totals = dict(zip(self.sums, sums.tolist(), strict=True))
        samples, tokens, slots = (totals.pop(name) for name in ("samples", "tokens", "slots"))
        metrics = {name: value / self.steps / dist.get_world_size() for name, value in totals.items()}
        return metrics | {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_waste": 1 - tokens / slots,
            "loader_stall": self.waited / seconds,
            "step_seconds": seconds / self.steps,
        }
