"""The training loop: batches in, steps out. It uses DeepSpeed's engine and knows nothing of Ray, MLflow or Dagster."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.training.engine import (
    Buffers,
    descend,
    forget_gradients,
    gradients_are_finite,
    leave_out,
    pass_over,
    take_step,
    weights_are_finite,
)
from mmflow.training.guards import Guards, Trouble
from mmflow.training.journal import Journal
from mmflow.training.metrics import Interval, Seen, free_memory_share, hardware_metrics, training_flops
from mmflow.training.validation import Validation

PREEMPTION = "preemption"
BEST = "best"  # validation asks for this checkpoint, not the clock
ASK_EVERY_SECONDS = 5.0  # as often as Ray itself checks which nodes will be taken away

Save = Callable[[int, LoaderState, Mapping[str, float], str], bool]
"""Saves a step with its state, metrics and reason; returns whether there was room."""


@dataclass(kw_only=True)
class TrainingLoop:
    """A training's loop as one rank runs it. Every rank runs it in step.

    The engine's module takes a batch and the step, and returns the loss to descend, (), and the parts to report by
    name. A line of the journal also ends at each checkpoint and validation, so that a resumed run writes the same lines
    as one that was never stopped.
    """

    engine: Any
    total_steps: int
    log_every: int
    due: Due
    save: Save
    guards: Guards
    journal: Journal
    shard_name: Callable[[int, int], str]  # (dataset, shard) → its name
    at: Callable[[int, str], None] = lambda step, doing: None  # is called with what the rank does
    memory_headroom: float = 0.0
    task_names: Sequence[str] = ()  # before each task's metrics; empty for a single task
    validation: Validation | None = None
    peak_flops: float | None = None  # of one accelerator
    _warned: bool = False
    _flops: dict[int, float] = field(default_factory=dict)  # of one sample, by task

    def run(self, source: Iterator[Batch], *, first_step: int, state: LoaderState) -> int:
        """Run the steps after `first_step`, beginning with the batch at `state`, and save whenever it is due; returns
        the last step, which is earlier than `total_steps` where validation ends the training.

        Raises what the guards raise for a wrong loss, or for a weight that is not finite, which is never saved.
        """
        self.engine.train()
        step = first_step
        if self.validation and step and self.validation.is_due(step) and self.validation.examined < step:
            self.validation.run(self.engine, step, self.journal)  # a preempted machine left it out
        interval = Interval(self.task_names, self._flops)
        while step < self.total_steps and not self._is_ended():
            step += 1
            state = self._step(source, step, state, interval)
            if not self._ends_interval(step):
                continue
            reason, metrics = self._end_interval(step, interval)
            interval = Interval(self.task_names, self._flops)
            if reason:
                self.at(step, "saving")
                if self.save(step, state, metrics, reason):
                    self.journal.event(step, "checkpoint", epoch=state.epoch, position=state.position, reason=reason)
        if self.validation and self.validation.best.ended:
            self.journal.event(step, "stopped", reason=self.validation.best.ended)
        return step

    def _is_ended(self) -> bool:
        return self.validation is not None and self.validation.best.ended is not None

    def _is_validated(self, step: int) -> bool:
        return self.validation is not None and self.validation.is_due(step)

    def _ends_interval(self, step: int) -> bool:
        is_logged = step % self.log_every == 0 or step == self.total_steps
        return is_logged or self.due.is_regular(step) or self._is_validated(step)

    def _step(self, source: Iterator[Batch], step: int, state: LoaderState, interval: Interval) -> LoaderState:
        """Take one step with the batch that begins at `state`, or leave it out; returns where the next one begins."""
        self.at(step, "loading")
        began = time.perf_counter()
        batch = next(source)
        interval.waited += time.perf_counter() - began
        self.at(step, "computing")
        if batch.task not in self._flops:
            began = time.perf_counter()
            self._flops[batch.task] = training_flops(self.engine, batch)
            interval.began += time.perf_counter() - began  # not part of the step
        if batch.skipped:
            self.journal.event(step, "skipped", samples=list(batch.skipped))
            if dist.get_rank() > 0:  # rank 0's journal only counts another rank's samples; its log names them
                warnings.warn(f"step {step}: left out: {'; '.join(batch.skipped)}", stacklevel=1)
        interval.batches[step] = (state, batch.keys, batch.places, batch.real)
        if step in self.guards.passed_over:
            pass_over(self.engine)
        elif not self._descend(batch, step, interval):
            samples = self._samples(interval.batches[step])
            self.journal.event(step, "left_out", reason="a gradient is not finite", samples=samples)
        return batch.state

    def _descend(self, batch: Batch, step: int, interval: Interval) -> bool:
        """Step down the batch's gradient; False where the guards watch the step and the gradient is not finite."""
        buffers = Buffers(self.engine.module) if self.guards.watches(step) else None
        if self.task_names:
            forget_gradients(self.engine)
        loss, parts = descend(self.engine, batch, step)
        if buffers and not gradients_are_finite(self.engine):
            leave_out(self.engine)
            buffers.restore()
            return False
        take_step(self.engine)
        interval.add(step, loss, parts, batch)
        return True

    def _end_interval(self, step: int, interval: Interval) -> tuple[str | None, dict[str, float]]:
        """Write a line of the journal, check the losses, validate; returns why a checkpoint is due, if one is, and its
        metrics."""
        is_last = step == self.total_steps
        metrics, losses, signals = self._exchange(step, interval)
        reason = None if is_last else self.due.reason(step, signals)
        trouble = self.guards.check(losses, interval.tasks)
        if trouble:
            self._handle(trouble, step, interval)
        if self.validation and self._is_validated(step) and reason != PREEMPTION:  # there may be no time for one
            self.at(step, "validating")
            validated, is_best = self.validation.run(self.engine, step, self.journal)
            metrics |= validated
            if is_best and not is_last:
                reason = reason or BEST
        if (reason or is_last or self._is_ended()) and not weights_are_finite(self.engine.module):
            # A gradient that is not finite spoils the weights after a good loss, and every restart from them.
            spoilt = Trouble("spoilt", (step,), "a weight is not finite, so nothing is saved")
            self._handle(spoilt, step, interval)
        return reason, metrics

    def _exchange(
        self, step: int, interval: Interval
    ) -> tuple[dict[str, float], dict[int, float], Mapping[str, float]]:
        """The interval's metrics over all ranks, which go into the journal; its losses by step; and what rank 0's clock
        says to all ranks. Collective."""
        device, headroom = self.engine.device, self.memory_headroom
        is_low = bool(headroom) and free_memory_share(device) < headroom
        if is_low and not self._warned:
            warnings.warn(f"step {step}: less than {headroom:.0%} of the memory is free", stacklevel=1)
        signals = {name: value * (dist.get_rank() == 0) for name, value in self.due.signals().items()}
        metrics, losses, signals = interval.close(device, {**signals, "low_memory": float(is_low)})
        if signals["low_memory"] and not self._warned:
            self._warned = True
            self.journal.event(step, "low_memory", ranks=int(signals["low_memory"]), headroom=headroom)
        if metrics:
            metrics["learning_rate"] = self.engine.get_lr()[0]
            norm = self.engine.get_global_grad_norm()
            if norm is not None:  # DeepSpeed has none at ZeRO 0
                metrics["gradient_norm"] = float(norm)
            metrics["skipped_steps"] = float(self.engine.skipped_steps)
            metrics |= hardware_metrics(device, metrics["model_tflops_per_second"], self.peak_flops)
            self.journal.metrics(step, metrics)
        return metrics, losses, signals

    def _handle(self, trouble: Trouble, step: int, interval: Interval) -> None:
        """Write a trouble and its first samples into the journal, and do what the guards decide. Collective."""
        seen = interval.batches[trouble.steps[0]]
        state, samples = seen[0], self._samples(seen)
        self.journal.event(step, trouble.kind, steps=trouble.steps, reason=trouble.message, samples=samples)
        self.guards.act(
            trouble,
            "lower learning_rate, let training.guards skip or rewind, or look at the samples that the journal names, "
            f"in epoch {state.epoch} from position {state.position} on",
        )

    def _samples(self, batch: Seen) -> dict[str, list[str]]:
        """Shard → keys of a global batch; every rank has its own part. Collective."""
        _, keys, places, real = batch
        positions = [(0, 0)] * len(keys) if places is None else places[:, :2].tolist()
        rows = [
            (*position, key) for position, key, is_real in zip(positions, keys, real.tolist(), strict=True) if is_real
        ]
        rows_of_ranks: list[list[tuple[int, int, str]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(rows_of_ranks, rows)
        samples: dict[str, list[str]] = {}
        for dataset, shard, key in (row for rows in rows_of_ranks for row in rows):
            samples.setdefault(self.shard_name(dataset, shard), []).append(key)
        return samples


class Due:
    """When a checkpoint is written: every so many steps or minutes, and before a node is taken away.

    The clock and the question about the node are rank 0's. The other ranks learn the answers with the numbers of a
    journal's line: an exchange of their own would cost every step. `preempted` says whether a node of this run will be
    taken away; it is collective.
    """

    def __init__(
        self, *, every_steps: int, every_minutes: float | None, preempted: Callable[[], bool] = lambda: False
    ) -> None:
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._preempted, self._is_saved = preempted, False
        self._last_saved = self._last_asked = time.monotonic()

    def is_regular(self, step: int) -> bool:
        """Whether a checkpoint is due by the number of steps alone."""
        return step % self._every_steps == 0

    def signals(self) -> dict[str, float]:
        """What rank 0's clock says: 1 for yes."""
        now = time.monotonic()
        minutes = (now - self._last_saved) / 60
        return {
            "old": float(self._every_minutes is not None and minutes >= self._every_minutes),
            "ask": float(now - self._last_asked >= ASK_EVERY_SECONDS),
        }

    def reason(self, step: int, signals: Mapping[str, float]) -> str | None:
        """Why a checkpoint is due now, or None. Every rank calls it with rank 0's signals."""
        is_preempted = False
        if signals["ask"]:
            self._last_asked = time.monotonic()
            # Once: the node may stay for minutes, and each checkpoint would delay the last one.
            is_preempted = self._preempted() and not self._is_saved
            self._is_saved |= is_preempted
        if is_preempted:
            reason = PREEMPTION
        elif self.is_regular(step):
            reason = "steps"
        elif signals["old"]:
            reason = "minutes"
        else:
            return None
        self._last_saved = time.monotonic()
        return reason
