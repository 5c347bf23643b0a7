"""The numbers in a line of the journal: means over steps and ranks, arithmetic against the hardware's peak, memory."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import rows_of

# Dense TFLOP/s by the words of a device's name, the more specific names first: (bf16, fp16, fp32), None where the
# device has no units for it. From the makers' data sheets (NVIDIA H200, H100, A100, L40S, L4, A10, V100 and T4 Tensor
# Core GPU; AMD Instinct MI300X and MI250X), without sparsity. fp32 is plain arithmetic: torch does not use TF32 unless
# asked to.
PEAKS: dict[str, tuple[float | None, float | None, float]] = {
    "H200 NVL": (835.5, 835.5, 60.0),
    "H200": (989.4, 989.4, 67.0),
    "H100 NVL": (835.5, 835.5, 60.0),
    "H100 PCIe": (756.0, 756.0, 51.0),
    "H100": (989.4, 989.4, 67.0),
    "A100": (312.0, 312.0, 19.5),
    "L40S": (362.0, 362.0, 91.6),
    "L4": (121.0, 121.0, 30.3),
    "A10": (125.0, 125.0, 31.2),
    "V100": (None, 125.0, 15.7),
    "T4": (None, 65.0, 8.1),
    "MI300X": (1307.4, 1307.4, 163.4),
    "MI250X": (191.5, 191.5, 23.9),  # one of its two dies, which are separate devices
}
PRECISIONS = ("bf16", "fp16", "fp32")
PASSES = 3  # a backward pass computes the gradients of inputs and of weights, as much again each (arXiv 2204.02311, B)
CGROUP = Path("/sys/fs/cgroup")
Seen = tuple[LoaderState, tuple[str, ...], NDArray[np.int64] | None, Tensor]
"""Where a batch began, and this rank's keys, their places, and which rows are real: a batch without its pixels."""


class Interval:
    """Sums over the steps between two lines of the journal. Ranks exchange them once, at its end."""

    def __init__(self, task_names: Sequence[str], flops: Mapping[int, float]) -> None:
        self.task_names = task_names  # empty for a single task
        self.flops = flops  # of one sample, by task
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds
        self.batches: dict[int, Seen] = {}  # by step
        self.losses: dict[int, Tensor] = {}
        self.tasks: dict[int, int] = {}
        self.sums: dict[str, Tensor] = {}
        self.steps: Counter[str] = Counter()  # that each sum is over

    def add(self, step: int, loss: Tensor, parts: Mapping[str, Tensor], batch: Batch) -> None:
        """A step that was taken."""
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
        if self.task_names:
            prefix = self.task_names[batch.task]
            parts = {f"{prefix}/{name}": value for name, value in {"loss": loss, **parts}.items()}
        for name, value in {**parts, **counts}.items():
            value = value.detach().double().reshape(())
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.steps[name] += 1

    def close(
        self, device: torch.device, signals: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[int, float], dict[str, float]]:
        """Means over steps and ranks, empty where no step was taken; each step's loss; and the signals' sums over
        ranks. Collective."""
        seconds = time.perf_counter() - self.began
        tensors = [*self.losses.values(), *self.sums.values()]
        last = torch.tensor(list(signals.values()), device=device).double()
        sums = torch.stack([value.to(device) for value in tensors] + list(last))
        dist.all_reduce(sums)
        num_ranks, values = dist.get_world_size(), sums.tolist()
        losses = dict(zip(self.losses, (value / num_ranks for value in values), strict=False))
        summed_signals = dict(zip(signals, values[len(tensors) :], strict=True))
        if not losses:
            return {}, {}, summed_signals
        totals = dict(zip(self.sums, values[len(losses) : len(tensors)], strict=True))
        names = ("samples", "tflops", "tokens", "slots", "skipped")
        samples, tflops, tokens, slots, skipped = (totals.pop(name) for name in names)
        metrics = {
            "loss": sum(losses.values()) / len(losses),
            **{name: value / self.steps[name] / num_ranks for name, value in totals.items()},
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "model_tflops_per_second": tflops / seconds,
            "padding_waste": 1 - tokens / slots,
            "skipped_samples": skipped,
            "loader_stall": self.waited / seconds,
            "step_seconds": seconds / len(losses),
        }
        return metrics, losses, summed_signals


# --- arithmetic -----------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device, config: TrainingConfig) -> float | None:
    """Dense operations a second, by the recipe or the maker's data sheet; None for an unknown device."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    return known_peak(torch.cuda.get_device_name(device), config.precision) if device.type == "cuda" else None


def known_peak(name: str, precision: str) -> float | None:
    """The peak by a device's own name, such as "NVIDIA A100-SXM4-80GB"."""
    words = set(name.replace("-", " ").split())
    for device, peaks in PEAKS.items():
        if words.issuperset(device.split()):
            peak = peaks[PRECISIONS.index(precision)]
            return None if peak is None else peak * 1e12
    return None


def training_flops(engine: Any, batch: Batch) -> float:
    """Floating-point operations of a sample's forward and backward pass, from a forward pass of some of a batch's rows.

    It counts what the model needs, not what is computed: activations that are recomputed and teachers do not count,
    and frozen layers count as if they were trained. Texts are as long as this batch's. Random states and weights do not
    change. Collective.
    """
    rows = rows_of(batch, slice(0, engine.train_micro_batch_size_per_gpu()))
    engine.eval()
    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with torch.no_grad(), uncompiled(engine.module), counter:  # the counter does not see into a compiled graph
        engine(rows, 0, examined=True)
    engine.train()
    forward: int = counter.get_total_flops()
    return PASSES * forward / len(rows.real)


def uncompiled(module: nn.Module) -> AbstractContextManager[object]:
    """Run a module without its compiled graphs: compiling one for a pass without gradients would take minutes."""
    is_compiled = any(part._compiled_call_impl is not None for part in module.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()


class _NoModules:
    """In place of the counter's tracker of modules, which hooks into the gradients of modules' outputs and fails where
    an output is part of a parameter, as a decoder's positions are."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """The CPU's attention, which torch's counter does not know."""
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


# --- memory ---------------------------------------------------------------------------------------------------------


def hardware_metrics(device: torch.device, tflops_per_second: float, peak: float | None) -> dict[str, float]:
    """The model's arithmetic as a share of the accelerators' `peak`, in operations a second of each; and the most
    memory that any rank has held, in bytes. Collective."""
    accelerator = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    most = torch.tensor([_peak_process_bytes(), accelerator], dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    process, accelerator = most.tolist()
    return {
        **({"mfu": 1e12 * tflops_per_second / (peak * dist.get_world_size())} if peak else {}),
        "peak_process_bytes": process,
        **({"peak_accelerator_bytes": accelerator} if accelerator else {}),
    }


def _peak_process_bytes() -> int:
    """The most resident memory so far, or what is resident now where the system keeps no peak. `getrusage` would give a
    process its parent's peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def free_memory_share(device: torch.device) -> float:
    """The free share of the machine's, the container's or the accelerator's memory, whichever is least."""
    machine = psutil.virtual_memory()
    shares = [machine.available / machine.total]
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no container, or one without a limit ("max")
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = 0  # memory that only caches files, which the kernel gives back
        with contextlib.suppress(OSError):
            lines = (CGROUP / "memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
        shares.append(1 - (used - cached) / limit)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        shares.append(1 - torch.cuda.max_memory_allocated(device) / total)
    return min(shares)
