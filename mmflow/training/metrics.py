"""The training loop: batches in, steps out. It knows DeepSpeed's engine and nothing of Ray, MLflow or Dagster."""

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
from mmflow.training.engine import (
    rows_of,
)

Seen = tuple[LoaderState, tuple[str, ...], NDArray[np.int64] | None, Tensor]
"""Where a batch began; this rank's keys, their places, and which rows are real."""


class Interval:
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


# Dense TFLOP/s by the words of a device's name, the more particular first: (bf16, fp16, fp32), None where there are no
# units for it. Of the makers' data sheets (NVIDIA H200, H100, A100, L40S, L4, A10, V100 and T4 Tensor Core GPU; AMD
# Instinct MI300X and MI250X), without sparsity. fp32 is plain arithmetic, by which torch multiplies unless told that it
# may use TF32.
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
    "MI250X": (191.5, 191.5, 23.9),  # of one of its two dies, which are devices of their own
}
PRECISIONS = ("bf16", "fp16", "fp32")
PASSES = 3  # a backward pass computes the gradients of inputs and of weights, as much again each (arXiv 2204.02311, B)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense operations a second that the device's maker promises; None where nobody here knows."""
    return known_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def known_peak(name: str, precision: str) -> float | None:
    """By what a device calls itself, such as "NVIDIA A100-SXM4-80GB"."""
    words = set(name.replace("-", " ").split())
    for each, peaks in PEAKS.items():
        if words.issuperset(each.split()):
            peak = peaks[PRECISIONS.index(precision)]
            return None if peak is None else peak * 1e12
    return None


def training_flops(engine: Any, batch: Batch) -> float:
    """Floating-point operations of a sample's forward and backward pass, by a forward pass of some of a batch's rows.

    What the model asks for, not what is computed: neither activations computed again nor a teacher count, and frozen
    layers as though they were trained. Texts are as long as this batch's. Collective; random states and weights stay
    as they are.
    """
    rows = rows_of(batch, slice(0, engine.train_micro_batch_size_per_gpu()))
    engine.eval()
    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    counter.mod_tracker = _AllAsOne()  # type: ignore[assignment]
    with torch.no_grad(), as_written(engine.module), counter:  # operations within a compiled graph are not seen
        engine(rows, 0, examined=True)
    engine.train()
    forward: int = counter.get_total_flops()
    return PASSES * forward / len(rows.real)


def as_written(module: nn.Module) -> AbstractContextManager[object]:
    """Have a module compute without its compiled graphs: one for a pass without gradients would take minutes."""
    is_compiled = any(each._compiled_call_impl is not None for each in module.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()


class _AllAsOne:
    """In place of what tells a counter by which module an operation is. That hooks itself to the gradients of what
    modules give, and fails where one gives a part of its parameter as it is, as a decoder's positions are."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Of the CPU's attention, which torch's counter does not know."""
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


def hardware_metrics(device: torch.device, tflops_per_second: float, peak: float | None) -> dict[str, float]:
    """For a line of the journal, over all ranks: what share the model's arithmetic is of the accelerators' `peak`, in
    operations a second of each; and the most memory that a rank has held, in bytes. Collective."""
    held = torch.tensor([_peak_process_bytes(), _peak_accelerator_bytes(device)], dtype=torch.float64, device=device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    process, accelerator = held.tolist()
    return {
        **({"mfu": 1e12 * tflops_per_second / (peak * dist.get_world_size())} if peak else {}),
        "peak_process_bytes": process,
        **({"peak_accelerator_bytes": accelerator} if accelerator else {}),
    }


def _peak_accelerator_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _peak_process_bytes() -> int:
    """The most that was resident; where the system keeps no such mark, what is now. Not `getrusage`, which gives a
    process its parent's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


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
