"""A DeepSpeed ZeRO engine with the traps of DeepSpeed handled once, here."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmflow.models.learning_rates import learning_rate_factors
from mmflow.training.config import OptimizerConfig


def prepare_deepspeed() -> None:
    """Set DeepSpeed up for this machine. Call it before torch.distributed starts.

    Without an accelerator DeepSpeed would compile a shared-memory extension on every rank (100 s and more), and a
    process killed meanwhile leaves a lock on which every later run hangs.
    """
    accelerated = torch.cuda.is_available()
    if not accelerated:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not accelerated:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep the buffers that a step frees for the next one, instead of giving them back to the kernel.

    Activations are megabytes each, which glibc maps anew and has zeroed page by page at every use: a tenth of the
    quickstart's step.
    """
    import ctypes

    top_pad, trim_threshold, mmap_max = -2, -1, -4  # M_TOP_PAD, M_TRIM_THRESHOLD, M_MMAP_MAX of <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl and macOS have none
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 << 20)


def build_engine(
    module: nn.Module,
    *,
    optimizer: OptimizerConfig,
    zero_stage: int,
    precision: str,
    global_batch_size: int,
    total_steps: int,
) -> Any:
    """A `DeepSpeedEngine` that trains `module` with AdamW and its schedule. torch.distributed must be running."""
    import deepspeed

    per_rank = -(-global_batch_size // dist.get_world_size())
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": per_rank,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.gradient_clipping,  # DeepSpeed clips at 1.0 unless told
        "zero_optimization": {"stage": zero_stage},
        # Handing in torch's own optimizer keeps DeepSpeed from compiling one of its own for minutes.
        "zero_allow_untested_optimizer": True,
        # Autocast, not DeepSpeed's "bf16": that makes parameters bf16 and leaves buffers and inputs fp32, on which a
        # convolution's input and a batch norm fail.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 1 << 60,
    }
    groups = parameter_groups(module, optimizer.learning_rate, optimizer.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=(0.9, optimizer.beta2))
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, learning_rate_schedule(optimizer, total_steps))
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=adamw, lr_scheduler=schedule, config=settings, dist_init_required=False
    )
    return engine


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms, biases and scales, which have at most one dimension, do not. The layers of an
    encoder with a `layer_decay` learn at rates of their own."""
    factors = learning_rate_factors(module)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((factors.get(name, 1.0), parameter.dim() > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * factor, "weight_decay": weight_decay if decays else 0.0}
        for (factor, decays), parameters in groups.items()
        if parameters
    ]


def learning_rate_schedule(optimizer: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Step → factor of the peak learning rate: linear warm-up, then a cosine to the final rate."""
    warmup = min(optimizer.warmup_steps, total_steps - 1)
    floor = optimizer.final_learning_rate / optimizer.learning_rate

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The fp32 weights and the buffers, on the CPU, whatever the ZeRO stage; one parameter at a time.

    Collective: every rank must call it. The result is complete on every rank, so only rank 0 should keep it.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    keep = dist.get_rank() == 0
    state = {}
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if master is None:  # stage 0, fp32: the parameter is its own master
            with GatheredParameters([parameter]):
                master = parameter.detach()
        if keep:
            state[name] = master.reshape(getattr(parameter, "ds_shape", parameter.shape)).float().cpu().clone()
    if keep:
        persistent = set(module.state_dict())
        for name, buffer in module.named_buffers():
            if name in persistent:
                state[name] = buffer.cpu().clone()
    return state
