"""A DeepSpeed ZeRO engine with the traps of DeepSpeed handled once, here."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmflow.core.allocator import keep_freed_memory
from mmflow.core.errors import RecipeError
from mmflow.models.learning_rates import learning_rate_factors
from mmflow.models.model import Model
from mmflow.training.averages import keep_average, whole_average
from mmflow.training.config import OptimizerConfig
from mmflow.training.fragments import fragments_of, places_of
from mmflow.training.optimizers import MUON, WholeParameterOptimizer, build_optimizer
from mmflow.training.schedules import learning_rate_schedule


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
        # Activations are megabytes each: a tenth of the quickstart's step.
        keep_freed_memory(grows_by=256 << 20)


def build_engine(
    module: nn.Module,
    *,
    optimizer: OptimizerConfig,
    zero_stage: int,
    precision: str,
    global_batch_size: int,
    total_steps: int,
    micro_batch_size: int | None = None,
    offload_optimizer: bool = False,
    ema_decay: float | None = None,
) -> Any:
    """A `DeepSpeedEngine` that trains `module`. torch.distributed must be running.

    Its `gradient_accumulation_steps()` is the number of micro-batches that a batch comes in.
    """
    import deepspeed

    groups = parameter_groups(module, optimizer.learning_rate, optimizer.weight_decay, muon=optimizer.name == "muon")
    stepping = build_optimizer(groups, optimizer)
    if ema_decay is not None:
        keep_average(stepping, ema_decay)
    if precision == "fp16":
        check_fp16("training", torch.cuda.is_available())
        # DeepSpeed makes parameters fp16 here, which leaves inputs and the losses' arithmetic to autocast.
        module.forward = torch.autocast("cuda", torch.float16)(module.forward)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=stepping,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(stepping, learning_rate_schedule(optimizer, total_steps)),
        config=engine_settings(
            zero_stage=zero_stage,
            precision=precision,
            rows_per_rank=-(-global_batch_size // dist.get_world_size()),
            gradient_clipping=optimizer.gradient_clipping,
            micro_batch_size=micro_batch_size,
            offload_optimizer=offload_optimizer,
        ),
        dist_init_required=False,
    )
    if isinstance(stepping, WholeParameterOptimizer):
        stepping.bind(fragments_of(engine), engine.device)
    return engine


def engine_settings(
    *,
    zero_stage: int,
    precision: str,
    rows_per_rank: int,
    gradient_clipping: float,
    micro_batch_size: int | None = None,
    offload_optimizer: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's configuration. A gradient clipping of 0 is none."""
    num_micro_batches = -(-rows_per_rank // (micro_batch_size or rows_per_rank))
    return {
        "train_micro_batch_size_per_gpu": -(-rows_per_rank // num_micro_batches),
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": gradient_clipping,  # DeepSpeed clips at 1.0 unless told
        "zero_optimization": {
            "stage": zero_stage,
            **({"offload_optimizer": {"device": "cpu"}} if offload_optimizer else {}),
        },
        # Handing in an optimizer keeps DeepSpeed from compiling one of its own for minutes, offloaded or not.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Autocast, not DeepSpeed's "bf16": that makes parameters bf16 and leaves buffers and inputs fp32, on which a
        # convolution's input and a batch norm fail. For fp16 its autocast clips gradients before it takes the loss
        # scale out, so there it must be DeepSpeed's own.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 1 << 60,
    }


def forget_gradients(engine: Any) -> None:
    """Empty the buffers in which ZeRO 3, and every stage that offloads, keeps gradients from step to step.

    Where a step uses a part of the model alone, the rest would move by the gradient of the last step that used it.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return
    if stage == 3:
        zero.grad_partitions_flat_buffer.zero_()
    for flat in zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups:
        if flat.grad is not None:
            flat.grad.zero_()


def check_fp16(key: str, accelerated: bool) -> None:
    """Raise RecipeError where there are no GPUs. `key` is the training section's."""
    if not accelerated:
        raise RecipeError(f"{key}.precision: fp16 needs GPUs, and the workers have none; take bf16 or fp32")


def compile_parts(model: Model) -> None:
    """Compile the parts that take the time. Not what joins them: exchanges between ranks break a graph."""
    for part in (model.image, model.text, model.fusion, model.decoder):
        if part is not None:
            part.compile()


def parameter_groups(
    module: nn.Module, learning_rate: float, weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms, biases and scales, which have at most one dimension, do not. The layers of an
    encoder with a `layer_decay` learn at rates of their own. For `muon` the groups that it takes are told apart."""
    factors = learning_rate_factors(module)
    hidden = _hidden_matrices(module) if muon else set()
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {(1.0, True, False): [], (1.0, False, False): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = factors.get(name, 1.0), parameter.dim() > 1, parameter in hidden
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * factor,
            "weight_decay": weight_decay if decays else 0.0,
            **({MUON: is_hidden} if muon else {}),
        }
        for (factor, decays, is_hidden), parameters in groups.items()
        if parameters
    ]


def _hidden_matrices(module: nn.Module) -> set[Tensor]:
    """The matrices of linear layers but those of heads, which read out, and of tables that are looked up in."""
    tables = {
        parameter for part in module.modules() if isinstance(part, nn.Embedding) for parameter in part.parameters()
    }
    reads_out = {
        parameter for part in module.modules() if isinstance(part, Model) for parameter in part.heads.parameters()
    }
    return {part.weight for part in module.modules() if isinstance(part, nn.Linear)} - tables - reads_out


def whole_state(module: nn.Module, averaged_by: Any = None) -> dict[str, Tensor]:
    """The fp32 weights and the buffers, on the CPU, whatever the ZeRO stage; one parameter at a time. The weights'
    running averages where the engine is given that keeps them.

    Collective: every rank must call it. Rank 0 has the result, the others nothing.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    keep = dist.get_rank() == 0
    places = {} if averaged_by is None else places_of(averaged_by)
    state = {}
    for name, parameter in module.named_parameters():
        master = whole_average(averaged_by, parameter, places) if averaged_by is not None else None
        if master is None:
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
