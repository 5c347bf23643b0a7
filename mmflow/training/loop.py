"""The training loop: batches in, steps out. It knows DeepSpeed's engine and nothing of Ray, MLflow or Dagster."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmflow.errors import TrainingError
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.training.descent import descend
from mmflow.training.telemetry import Journal


def train(
    engine: Any,
    source: Iterator[Batch],
    *,
    first_step: int,
    total_steps: int,
    log_every: int,
    checkpoint_every: int,
    save: Callable[[int, LoaderState], None],
    journal: Journal | None,
) -> None:
    """Run the steps after `first_step` to `total_steps`, saving every `checkpoint_every`.

    The engine's module takes a batch and the step, and gives the loss to descend, (), and the parts to report by name.
    Every rank calls it; rank 0 has a journal. An interval of the journal also ends at each checkpoint, so that a run
    that was resumed writes the same lines as one that was never stopped. Raises TrainingError when the mean loss of an
    interval is not finite, or a weight that would be saved.
    """
    engine.train()
    interval = _Interval()
    for step in range(first_step + 1, total_steps + 1):
        began = time.perf_counter()
        batch = next(source)
        interval.waited += time.perf_counter() - began
        loss, parts = descend(engine, batch, step)
        engine.step()
        interval.add(loss, parts, batch)
        if batch.skipped:
            if journal:
                journal.event(step, "skipped", samples=list(batch.skipped))
            else:  # another rank's journal counts them; its log names them
                warnings.warn(f"step {step}: left out: {'; '.join(batch.skipped)}", stacklevel=1)
        checkpoint_due = step % checkpoint_every == 0 and step < total_steps
        if step % log_every == 0 or step == total_steps or checkpoint_due:
            metrics = interval.close()
            metrics["learning_rate"] = engine.get_lr()[0]
            norm = engine.get_global_grad_norm()
            if norm is not None:  # ZeRO 0 keeps it to itself
                metrics["gradient_norm"] = float(norm)
            metrics["skipped_steps"] = float(engine.skipped_steps)
            if journal:
                journal.metrics(step, metrics)
            if not math.isfinite(metrics["loss"]):  # a mean over ranks, so every rank raises
                raise TrainingError(f"step {step}: the loss is {metrics['loss']}; {_advice(batch.state)}")
            interval = _Interval()
        if checkpoint_due:
            # A gradient that is not finite spoils the weights after a sound loss, and every restart from them.
            if not _weights_are_finite(engine.module):
                raise TrainingError(f"step {step}: a weight is not finite, so none is saved; {_advice(batch.state)}")
            save(step, batch.state)
            if journal:
                journal.event(step, "checkpoint", epoch=batch.state.epoch, position=batch.state.position)


def _advice(state: LoaderState) -> str:
    return f"lower learning_rate, or look at the samples of epoch {state.epoch} before position {state.position}"


@torch.no_grad()
def _weights_are_finite(module: nn.Module) -> bool:
    """Whether every rank's weights are; ZeRO 3 leaves a rank its own part of each, in `ds_tensor`."""
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    finite = torch.stack([each.isfinite().all() for each in held]).all().to(torch.uint8)
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


class _Interval:
    """Sums over the steps between two lines of the journal; exchanged between ranks once, at its end."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, parts: Mapping[str, Tensor], batch: Batch) -> None:
        self.steps += 1
        tokens = (batch.token_mask * batch.real[:, None]).sum()  # indexing by a mask would wait for the device
        counts = {
            "samples": batch.real.sum(),
            "tokens": tokens,
            "slots": torch.tensor(batch.token_mask.numel()),
            "skipped": torch.tensor(len(batch.skipped)),
        }
        for name, value in {"loss": loss, **parts, **counts}.items():
            value = value.detach().double().reshape(())
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def close(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        device = self.sums["loss"].device
        sums = torch.stack([value.to(device) for value in self.sums.values()])
        dist.all_reduce(sums)
        totals = dict(zip(self.sums, sums.tolist(), strict=True))
        samples, tokens, slots, skipped = (totals.pop(name) for name in ("samples", "tokens", "slots", "skipped"))
        metrics = {name: value / self.steps / dist.get_world_size() for name, value in totals.items()}
        return metrics | {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_waste": 1 - tokens / slots,
            "skipped_samples": skipped,
            "loader_stall": self.waited / seconds,
            "step_seconds": seconds / self.steps,
        }
