"""What a training makes of its hardware: its model's arithmetic beside the peak of the accelerators, and memory."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmflow.loading.batches import Batch
from mmflow.training.descent import rows_of

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
