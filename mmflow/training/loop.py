"""When a checkpoint is written: every so many steps, every so many minutes, and before a node is taken away.

The clock and the question of a node are rank 0's, and all ranks hear of them with the numbers of a journal's line: an
exchange of their own would cost every step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
BEST = "best"  # a validation's word, not the clock's
ASK_EVERY_SECONDS = 5.0  # as often as Ray itself looks which nodes are to go


class Due:
    """Decides together on all ranks. `preempted` says whether a node that this run is on is to go; collective."""

    def __init__(
        self, *, every_steps: int, every_minutes: float | None, preempted: Callable[[], bool] = lambda: False
    ) -> None:
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._preempted, self._is_saved = preempted, False
        self._last_saved = self._last_asked = time.monotonic()

    def is_regular(self, step: int) -> bool:
        """Whether the steps' number alone asks for one."""
        return step % self._every_steps == 0

    def signals(self) -> dict[str, float]:
        """What rank 0 says to all: 1 for yes."""
        now = time.monotonic()
        minutes = (now - self._last_saved) / 60
        return {
            "old": float(self._every_minutes is not None and minutes >= self._every_minutes),
            "ask": float(now - self._last_asked >= ASK_EVERY_SECONDS),
        }

    def reason(self, step: int, signals: Mapping[str, float]) -> str | None:
        """Why one is due now, if one is. All ranks call it with what rank 0 said."""
        preempted = False
        if signals["ask"]:
            self._last_asked = time.monotonic()
            # Once: the node may stay for minutes, and each checkpoint would delay the last.
            preempted = self._preempted() and not self._is_saved
            self._is_saved |= preempted
        if preempted:
            reason = PREEMPTION
        elif self.is_regular(step):
            reason = "steps"
        elif signals["old"]:
            reason = "minutes"
        else:
            return None
        self._last_saved = time.monotonic()
        return reason


Save = Callable[[int, LoaderState, Mapping[str, float], str], bool]
"""Of a step, its state and metrics, and why; whether there was room."""
ShardName = Callable[[int, int], str]  # (dataset, shard) → its name


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
    interval = Interval(tasks, flops)
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
        interval = Interval(tasks, flops)
        if reason:
            at(step, "saving")
            if save(step, state, metrics, reason) and journal:
                journal.event(step, "checkpoint", epoch=state.epoch, position=state.position, reason=reason)
    if journal and validation and validation.best.ended:
        journal.event(step, "stopped", reason=validation.best.ended)
    return step


def _step(engine: Any, batch: Batch, step: int, interval: Interval, *, watched: bool) -> bool:
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
    trouble: Trouble, step: int, interval: Interval, guards: Guards, journal: Journal | None, shard_name: ShardName
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
