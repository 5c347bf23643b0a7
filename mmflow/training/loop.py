"""The training loop: batches in, steps out. It knows DeepSpeed's engine and nothing of Ray, MLflow or Dagster."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.training.descent import descend
from mmflow.training.due import BEST, PREEMPTION, Due
from mmflow.training.engine import forget_gradients
from mmflow.training.guards import (
    Buffers,
    Guards,
    Trouble,
    free_memory_share,
    gradients_are_finite,
    leave_out,
    pass_over,
    take_step,
    weights_are_finite,
)
from mmflow.training.hardware import hardware_metrics, training_flops
from mmflow.training.telemetry import Journal
from mmflow.training.validation import Validation

Save = Callable[[int, LoaderState, Mapping[str, float], str], bool]
"""Of a step, its state and metrics, and why; whether there was room."""
ShardName = Callable[[int, int], str]  # (dataset, shard) → its name
Seen = tuple[LoaderState, tuple[str, ...], NDArray[np.int64] | None, Tensor]
"""Where a batch began; this rank's keys, their places, and which rows are real."""


def train(
    engine: Any,
    source: Iterator[Batch],
    *,
    first_step: int,
    state: LoaderState,
    total_steps: int,
    log_every: int,
    due: Due,
    save: Save,
    guards: Guards,
    journal: Journal | None,
    shard_name: ShardName,
    at: Callable[[int, str], None] = lambda step, doing: None,
    memory_headroom: float = 0.0,
    tasks: Sequence[str] = (),
    validation: Validation | None = None,
    peak_flops: float | None = None,
) -> int:
    """Run the steps after `first_step`, whose batch begins at `state`, to `total_steps`, saving whenever it is due;
    the last step, which is an earlier one where validation ends the training.

    The engine's module takes a batch and the step, and gives the loss to descend, (), and the parts to report by name.
    Every rank calls it; rank 0 has a journal. `at` is told what the rank does. An interval of the journal also ends at
    each checkpoint and validation, so that a run that was resumed writes the same lines as one that was never stopped.
    Of several tasks each has metrics of its own name. `peak_flops` are those of an accelerator. Raises what the guards
    do about a loss that is wrong or a weight that is not finite, which is never saved.
    """
    engine.train()
    warned = False
    flops: dict[int, float] = {}  # of a sample, by task
    step = first_step
    if validation and step and validation.is_due(step) and validation.examined < step:
        validation.look(engine, step, journal)  # which a machine that had to go left out
    interval = _Interval(tasks, flops)
    while step < total_steps and not (validation and validation.best.ended):
        step += 1
        at(step, "loading")
        began = time.perf_counter()
        batch = next(source)
        interval.waited += time.perf_counter() - began
        at(step, "computing")
        if batch.task not in flops:
            began = time.perf_counter()
            flops[batch.task] = training_flops(engine, batch)
            interval.began += time.perf_counter() - began  # no part of the step
        if batch.skipped:
            if journal:
                journal.event(step, "skipped", samples=list(batch.skipped))
            else:  # another rank's journal counts them; its log names them
                warnings.warn(f"step {step}: left out: {'; '.join(batch.skipped)}", stacklevel=1)
        interval.batches[step] = (state, batch.keys, batch.places, batch.real)
        if step in guards.passed_over:
            pass_over(engine)
        elif not _step(engine, batch, step, interval, watched=guards.watches(step)):
            samples = _samples(shard_name, interval.batches[step])
            if journal:
                journal.event(step, "left_out", reason="a gradient is not finite", samples=samples)
        state = batch.state
        is_last = step == total_steps
        is_validated = validation is not None and validation.is_due(step)
        if not (step % log_every == 0 or is_last or due.is_regular(step) or is_validated):
            continue

        low_memory = bool(memory_headroom) and free_memory_share(engine.device) < memory_headroom
        if low_memory and not warned:
            warnings.warn(f"step {step}: less than {memory_headroom:.0%} of the memory is free", stacklevel=1)
        metrics, losses, signals = interval.close(engine.device, {**due.signals(), "low_memory": float(low_memory)})
        if signals["low_memory"] and not warned:
            warned = True
            if journal:
                journal.event(step, "low_memory", ranks=int(signals["low_memory"]), headroom=memory_headroom)
        if metrics:
            metrics["learning_rate"] = engine.get_lr()[0]
            norm = engine.get_global_grad_norm()
            if norm is not None:  # ZeRO 0 keeps it to itself
                metrics["gradient_norm"] = float(norm)
            metrics["skipped_steps"] = float(engine.skipped_steps)
            metrics |= hardware_metrics(engine.device, metrics["model_tflops_per_second"], peak_flops)
            if journal:
                journal.metrics(step, metrics)
        reason = None if is_last else due.reason(step, signals)
        trouble = guards.look(losses, interval.tasks)
        if trouble:
            _meet(trouble, step, interval, guards, journal, shard_name)
        if validation and is_validated and reason != PREEMPTION:  # whose machine may be gone before it is done
            at(step, "validating")
            validated, is_wanted = validation.look(engine, step, journal)
            metrics |= validated
            if is_wanted and not is_last:
                reason = reason or BEST
        ends = is_last or (validation is not None and validation.best.ended is not None)
        if (reason or ends) and not weights_are_finite(engine.module):
            # A gradient that is not finite spoils the weights after a sound loss, and every restart from them. Leaving
            # steps out mends none of it.
            spoilt = Trouble("spoilt", (step,), "a weight is not finite, so none is saved")
            _meet(spoilt, step, interval, guards, journal, shard_name)
        interval = _Interval(tasks, flops)
        if reason:
            at(step, "saving")
            if save(step, state, metrics, reason) and journal:
                journal.event(step, "checkpoint", epoch=state.epoch, position=state.position, reason=reason)
    if journal and validation and validation.best.ended:
        journal.event(step, "stopped", reason=validation.best.ended)
    return step


def _step(engine: Any, batch: Batch, step: int, interval: _Interval, *, watched: bool) -> bool:
    """Take a step; False where it was left out, because it was watched and its gradients are not finite."""
    buffers = Buffers(engine.module) if watched else None
    if interval.names:
        forget_gradients(engine)
    loss, parts = descend(engine, batch, step)
    if buffers and not gradients_are_finite(engine):
        leave_out(engine)
        buffers.bring_back()
        return False
    take_step(engine)
    interval.add(step, loss, parts, batch)
    return True


def _meet(
    trouble: Trouble, step: int, interval: _Interval, guards: Guards, journal: Journal | None, shard_name: ShardName
) -> None:
    """Write down a trouble and the samples that it began with, and do what the guards say. Collective."""
    first = interval.batches[trouble.steps[0]]
    samples = _samples(shard_name, first)
    if journal:
        journal.event(step, trouble.kind, steps=trouble.steps, reason=trouble.what, samples=samples)
    guards.act(trouble, _advice(first[0]))


def _advice(state: LoaderState) -> str:
    return (
        f"lower learning_rate, let training.guards skip or rewind, or look at the samples that the journal names, of "
        f"epoch {state.epoch} from position {state.position} on"
    )


def _samples(shard_name: ShardName, batch: Seen) -> dict[str, list[str]]:
    """Shard → keys of a global batch, of which every rank has its own. Collective."""
    _, keys, places, real = batch
    found = [(0, 0)] * len(keys) if places is None else places[:, :2].tolist()
    mine = [(*place, key) for place, key, is_real in zip(found, keys, real.tolist(), strict=True) if is_real]
    of_ranks: list[list[tuple[int, int, str]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    samples: dict[str, list[str]] = {}
    for dataset, shard, key in (row for rows in of_ranks for row in rows):
        samples.setdefault(shard_name(dataset, shard), []).append(key)
    return samples


class _Interval:
    """Sums over the steps between two lines of the journal; exchanged between ranks once, at its end."""

    def __init__(self, names: Sequence[str], flops: Mapping[int, float]) -> None:
        self.names = names  # of the tasks, where there are several
        self.flops = flops  # of a sample, by task
        self.began = time.perf_counter()
        self.waited = 0.0
        self.batches: dict[int, Seen] = {}
        self.losses: dict[int, Tensor] = {}
        self.tasks: dict[int, int] = {}
        self.sums: dict[str, Tensor] = {}
        self.steps: Counter[str] = Counter()  # that each of the sums is of

    def add(self, step: int, loss: Tensor, parts: Mapping[str, Tensor], batch: Batch) -> None:
        tokens = (batch.token_mask * batch.real[:, None]).sum()  # indexing by a mask would wait for the device
        samples = batch.real.sum()
        counts = {
            "samples": samples,
            "tflops": samples * (self.flops[batch.task] / 1e12),
            "tokens": tokens,
            "slots": torch.tensor(batch.token_mask.numel()),
            "skipped": torch.tensor(len(batch.skipped)),
        }
        self.losses[step] = loss.detach().double().reshape(())
        self.tasks[step] = batch.task
        if self.names:
            parts = {f"{self.names[batch.task]}/{name}": value for name, value in {"loss": loss, **parts}.items()}
        for name, value in {**parts, **counts}.items():
            value = value.detach().double().reshape(())
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.steps[name] += 1

    def close(
        self, device: torch.device, signals: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[int, float], dict[str, float]]:
        """Means over steps and ranks, none where no step was taken; each step's loss; the signals' sums over ranks,
        of which rank 0 alone speaks for the clock."""
        seconds = time.perf_counter() - self.began
        said = [value if dist.get_rank() == 0 or name == "low_memory" else 0.0 for name, value in signals.items()]
        tensors = [*self.losses.values(), *self.sums.values()]
        sums = torch.stack([value.to(device) for value in tensors] + list(torch.tensor(said, device=device).double()))
        dist.all_reduce(sums)
        num_ranks, values = dist.get_world_size(), sums.tolist()
        losses = dict(zip(self.losses, (value / num_ranks for value in values), strict=False))
        heard = dict(zip(signals, values[len(tensors) :], strict=True))
        if not losses:
            return {}, {}, heard
        totals = dict(zip(self.sums, values[len(losses) : len(tensors)], strict=True))
        names = ("samples", "tflops", "tokens", "slots", "skipped")
        samples, tflops, tokens, slots, skipped = (totals.pop(name) for name in names)
        metrics = {"loss": sum(losses.values()) / len(losses)}
        metrics |= {name: value / self.steps[name] / num_ranks for name, value in totals.items()}
        return (
            metrics
            | {
                "samples_per_second": samples / seconds,
                "tokens_per_second": tokens / seconds,
                "model_tflops_per_second": tflops / seconds,
                "padding_waste": 1 - tokens / slots,
                "skipped_samples": skipped,
                "loader_stall": self.waited / seconds,
                "step_seconds": seconds / len(losses),
            },
            losses,
            heard,
        )
