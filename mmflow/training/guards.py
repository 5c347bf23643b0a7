"""What watches the numbers of a training, and what becomes of those that are wrong."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmflow.core.errors import TrainingError
from mmflow.training.config import GuardsConfig

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.01  # of the median: a loss that hardly moves has a deviation of nothing


@dataclass(frozen=True)
class Trouble:
    """Steps whose numbers are wrong."""

    kind: Literal["nonfinite", "spike", "spoilt"]
    steps: tuple[int, ...]
    what: str


class Rewind(Exception):  # noqa: N818 — not an error: the training goes on
    """Go on from the last checkpoint."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.what)
        self.trouble = trouble


class Guards:
    """What is known of a run's troubles, the same on every rank."""

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        # By task: the losses of one are no measure of another's.
        self._losses: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=config.spike_window))
        self._rewinds = 0
        self._watched_until = 0
        self.passed_over: frozenset[int] = frozenset()
        """Steps that change no weight, because their batches spiked."""

    def watches(self, step: int) -> bool:
        """Whether the step's gradients are looked at before they are used."""
        return self._config.on_nonfinite == "skip" or step <= self._watched_until

    def look(self, losses: Mapping[int, float], tasks: Mapping[int, int] | None = None) -> Trouble | None:
        """The trouble of some steps, by their losses over all ranks and their tasks; sound ones join the window."""
        bad = [step for step, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            return Trouble("nonfinite", tuple(bad), f"the loss is {losses[bad[0]]}")
        if self._config.on_spike == "ignore":
            return None
        high = []
        for step, loss in losses.items():
            before = self._losses[tasks[step] if tasks else 0]
            limit = spike_limit(before, self._config.spike_deviations)
            if len(before) >= self._config.spike_window // 2 and loss > limit:
                high.append(step)
            else:
                before.append(loss)
        if not high:
            return None
        return Trouble("spike", tuple(high), f"the loss is {losses[high[0]]:.4g}, far above those before it")

    def act(self, trouble: Trouble, advice: str) -> None:
        """Return where the training goes on. Raises Rewind, or TrainingError with the advice."""
        policy = self._config.on_spike if trouble.kind == "spike" else self._config.on_nonfinite
        if trouble.kind == "spoilt" and policy == "skip":
            policy = "stop"
        if policy == "rewind" and self._rewinds < self._config.max_rewinds:
            raise Rewind(trouble)
        if policy in ("stop", "rewind"):
            after = f" after {self._rewinds} rewinds" if self._rewinds else ""
            raise TrainingError(f"step {trouble.steps[0]}: {trouble.what}{after}; {advice}")

    def rewound(self, trouble: Trouble) -> None:
        """What to do otherwise on the way back to where the trouble was."""
        self._rewinds += 1
        self._losses.clear()
        if trouble.kind == "spike":
            # A loss is of the weights that the step before left.
            self.passed_over |= set(trouble.steps) | {trouble.steps[0] - 1}
        else:
            self._watched_until = max(self._watched_until, trouble.steps[-1])

    def state(self) -> dict[str, Any]:
        """What a restart must know of it, as JSON."""
        return {"rewinds": self._rewinds, "passed_over": sorted(self.passed_over)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What an earlier process knew."""
        self._rewinds = state["rewinds"]
        self.passed_over = frozenset(state["passed_over"])


def spike_limit(losses: Sequence[float] | deque[float], deviations: float) -> float:
    """The loss above which one is a spike: so many deviations above the median, which a spike does not move."""
    if not losses:
        return math.inf
    median = statistics.median(losses)
    mad = statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(MAD_TO_DEVIATION * mad, LEAST_DEVIATION * abs(median))


# --- steps that change no weight ------------------------------------------------------------------------------------


def gradients_are_finite(engine: Any) -> bool:
    """Whether those of the backward pass are, on every rank. Between backward and step; collective."""
    if engine.zero_optimization_stage() == 0:  # each rank has all of them, reduced
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        return bool(torch.stack([each.isfinite().all() for each in gradients]).all())
    engine.optimizer.check_overflow()
    return not engine.optimizer.overflow


def take_step(engine: Any) -> None:
    """Take the step that a backward pass prepared. One that DeepSpeed drops, because its gradients do not fit the loss
    scale of fp16, counts in the schedule too: DeepSpeed would end a training before its rate has come down."""
    engine.step()
    if getattr(engine.optimizer, "overflow", False):
        engine.lr_scheduler.step()


def leave_out(engine: Any) -> None:
    """End a step whose gradients `gradients_are_finite` refused: it changes no weight, and counts."""
    if engine.zero_optimization_stage() == 0:
        engine.zero_grad()
        pass_over(engine)
        return
    engine.step()  # DeepSpeed drops the gradients that it was told overflow
    engine.optimizer.overflow = False
    engine.lr_scheduler.step()


def pass_over(engine: Any) -> None:
    """Count a step without a batch: the schedule goes by the steps of the plan, not by those that were taken."""
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine.micro_steps += engine.gradient_accumulation_steps()
    engine.skipped_steps += 1
    engine.lr_scheduler.step()


class Buffers:
    """A model's running statistics before a step: a batch that is left out must not stay in them."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in module.buffers()]

    @torch.no_grad()
    def bring_back(self) -> None:
        """Undo what the step's forward pass did to them."""
        for buffer, before in self._kept:
            buffer.copy_(before)


@torch.no_grad()
def weights_are_finite(module: nn.Module) -> bool:
    """Whether every rank's weights and buffers are; ZeRO 3 leaves a rank its own part of a weight, in `ds_tensor`."""
    held = [_held(parameter) for parameter in module.parameters()]
    held += list(module.buffers())
    finite = torch.stack([each.isfinite().all() for each in held]).all().to(torch.uint8)
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def _held(parameter: Any) -> Tensor:
    """What this rank holds of a weight, without what pads the last ranks' parts: whatever memory held before."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter  # type: ignore[no-any-return]
    part: Tensor = parameter.ds_tensor
    return part[: max(0, parameter.ds_numel - dist.get_rank() * part.numel())]


# --- memory ---------------------------------------------------------------------------------------------------------


def free_memory_share(device: torch.device) -> float:
    """How much of its memory a rank may still take: of the machine, of the container, of its accelerator, the least."""
    machine = psutil.virtual_memory()
    shares = [machine.available / machine.total]
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit and used is not None:
        shares.append(1 - (used - _reclaimable()) / limit)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        shares.append(1 - torch.cuda.max_memory_allocated(device) / total)
    return min(shares)


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable() -> int:
    """Bytes of files that the kernel gives back when asked."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
