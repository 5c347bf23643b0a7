"""A DeepSpeed ZeRO engine and its steps, with DeepSpeed's traps handled once, here."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.core.memory import keep_freed_memory
from mmflow.learning.learner import MicroBatch, Parts
from mmflow.loading.batches import Batch
from mmflow.models.model import Model, Scale, learning_rate_factors
from mmflow.training.config import TrainingConfig
from mmflow.training.optimizers import (
    MUON,
    WholeParameterOptimizer,
    build_optimizer,
    keep_average,
    learning_rate_schedule,
    whole_average,
)
from mmflow.training.zero import flat_groups, places_of


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


def build_engine(module: nn.Module, training: TrainingConfig, total_steps: int) -> Any:
    """A `DeepSpeedEngine` that trains `module`. torch.distributed must be running.

    Its `gradient_accumulation_steps()` is the number of micro-batches in a batch.
    """
    import deepspeed

    config = training.optimizer
    groups = parameter_groups(module, config.learning_rate, config.weight_decay, muon=config.name == "muon")
    optimizer = build_optimizer(groups, config)
    if training.ema_decay is not None:
        keep_average(optimizer, training.ema_decay)
    if training.precision == "fp16":
        check_fp16("training", torch.cuda.is_available())
        # DeepSpeed makes parameters fp16 here, which leaves inputs and the losses' arithmetic to autocast.
        module.forward = torch.autocast("cuda", torch.float16)(module.forward)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_schedule(config, total_steps)),
        config=engine_settings(training, -(-training.global_batch_size // dist.get_world_size())),
        dist_init_required=False,
    )
    if isinstance(optimizer, WholeParameterOptimizer):
        optimizer.bind(places_of(engine).values(), engine.device)
    return engine


def engine_settings(training: TrainingConfig, rows_per_rank: int, *, clipped: bool = True) -> dict[str, Any]:
    """DeepSpeed's configuration for a step of so many rows on each rank."""
    num_micro_batches = -(-rows_per_rank // (training.micro_batch_size or rows_per_rank))
    return {
        "train_micro_batch_size_per_gpu": -(-rows_per_rank // num_micro_batches),
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": training.optimizer.gradient_clipping if clipped else 0.0,  # 1.0 unless set
        "zero_optimization": {
            "stage": training.zero_stage,
            **({"offload_optimizer": {"device": "cpu"}} if training.offload_optimizer else {}),
        },
        # Passing an optimizer keeps DeepSpeed from compiling one of its own for minutes, offloaded or not.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Autocast, not DeepSpeed's "bf16": that makes parameters bf16 and leaves buffers and inputs fp32, on which a
        # convolution's input and a batch norm fail. For fp16 its autocast clips gradients before it removes the loss
        # scale, so there it must be DeepSpeed's own.
        "torch_autocast": {"enabled": training.precision == "bf16", "dtype": "bfloat16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "steps_per_print": 1 << 60,
    }


def check_fp16(key: str, accelerated: bool) -> None:
    """Raise RecipeError where there are no GPUs. `key` is the training section's."""
    if not accelerated:
        raise RecipeError(f"{key}.precision: fp16 needs GPUs, and the workers have none; set it to bf16 or fp32")


def compile_parts(model: Model) -> None:
    """Compile the parts that take the time. What joins them is left: exchanges between ranks break a graph."""
    for part in (model.image, model.text, model.fusion, model.decoder):
        if part is not None:
            part.compile()


def parameter_groups(
    module: nn.Module, learning_rate: float, weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """The optimizer's groups: matrices and kernels decay; norms, biases and scales, which have at most one dimension,
    do not. The layers of an encoder with a `layer_decay` have learning rates of their own. With `muon`, each group says
    whether Muon steps it."""
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
    """The matrices of linear layers, without those of heads and those that also serve as embedding tables."""
    tables = {
        parameter for part in module.modules() if isinstance(part, nn.Embedding) for parameter in part.parameters()
    }
    heads = {parameter for part in module.modules() if isinstance(part, Model) for parameter in part.heads.parameters()}
    return {part.weight for part in module.modules() if isinstance(part, nn.Linear)} - tables - heads


def whole_state(module: nn.Module, averaged_by: Any = None) -> dict[str, Tensor]:
    """The fp32 weights and the buffers, on the CPU, at any ZeRO stage, gathered one parameter at a time; with the
    engine as `averaged_by`, the weights' running averages.

    Collective: every rank must call it. Rank 0 gets the result, the others an empty dict.
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


# --- a step's gradient ----------------------------------------------------------------------------------------------


def descend(engine: Any, batch: Batch, step: int) -> tuple[Tensor, Parts]:
    """Forward and backward of this rank's part of a batch, at once or in micro-batches; the loss, () without a graph,
    and its parts by name.

    One `engine.step()` must follow. Collective.
    """
    num_micro_batches = engine.gradient_accumulation_steps()
    if num_micro_batches == 1:
        loss, parts = engine(batch, step)
        engine.backward(loss)
        return loss.detach(), parts
    return _in_micro_batches(engine, batch, step, num_micro_batches)


def _in_micro_batches(engine: Any, batch: Batch, step: int, num_micro_batches: int) -> tuple[Tensor, Parts]:
    learner, size = engine.module, engine.train_micro_batch_size_per_gpu()
    cuts = [slice(start, min(start + size, len(batch.real))) for start in range(0, len(batch.real), size)]
    rows = learner.rows(batch)
    places = learner.count_places(batch, step, rows, cuts)
    pieces = [
        (rows_of(batch, cut), MicroBatch(rows.micro_batch(cut, num_micro_batches), places, gradients={}))
        for cut in cuts
    ]
    loss, parts = torch.zeros((), device=batch.real.device), Parts()
    states: list[dict[str, Tensor]] = []
    if learner.compares_rows(batch):
        embedded = []
        buffers = Buffers(learner)
        with torch.no_grad():
            for piece, micro_batch in pieces:
                states.append(random_state(engine.device))
                embedded.append(engine(piece, step, replace(micro_batch, gradients=None))[1])
        buffers.restore()  # a batch counts once in running statistics
        loss, parts, gradients = learner.compare(batch, step, rows, _joined(embedded))
        pieces = [
            (piece, replace(micro_batch, gradients=_gradients_of(gradients, cut, num_micro_batches)))
            for (piece, micro_batch), cut in zip(pieces, cuts, strict=True)
        ]
    for number, (piece, micro_batch) in enumerate(pieces):
        engine.set_gradient_accumulation_boundary(number == num_micro_batches - 1)
        if states:
            set_random_state(engine.device, states[number])  # dropout must drop the same units again
        micro_loss, micro_parts = engine(piece, step, micro_batch)
        engine.backward(micro_loss)
        loss = loss + micro_loss.detach() / num_micro_batches
        for name, value in micro_parts.items():
            parts[name] = parts.get(name, 0.0) + value.detach() / num_micro_batches
    return loss, parts


def rows_of(batch: Batch, cut: slice) -> Batch:
    """Some rows of a batch, as a batch."""
    places = None if batch.places is None else batch.places[cut]
    return replace(batch.map_tensors(lambda tensor: tensor[cut]), keys=batch.keys[cut], places=places, skipped=())


def _joined(embedded: Sequence[Parts]) -> Parts:
    """The embeddings of all micro-batches in order, and the scale, which is the same in each."""
    return {
        name: first if name in Scale._fields else torch.cat([parts[name] for parts in embedded])
        for name, first in embedded[0].items()
    }


def _gradients_of(gradients: Parts, cut: slice, num_micro_batches: int) -> Parts:
    """A micro-batch's gradients. DeepSpeed divides its gradient by the number of micro-batches; each has a part in the
    scale's."""
    return {
        name: gradient if name in Scale._fields else gradient[cut] * num_micro_batches
        for name, gradient in gradients.items()
    }


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state that dropout draws from, by kind of device: an accelerator has its own beside the CPU's."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    """Draw from a state that `random_state` returned for a device of the same kind."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


# --- steps that are taken, and steps that change no weight ----------------------------------------------------------


def forget_gradients(engine: Any) -> None:
    """Empty the buffers in which ZeRO 3, and every stage that offloads, keeps gradients from step to step.

    Where a step uses only a part of the model, the rest would move by the gradient of the last step that used it.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return
    if stage == 3:
        zero.grad_partitions_flat_buffer.zero_()
    for flat, _ in flat_groups(engine):
        if flat.grad is not None:
            flat.grad.zero_()


def gradients_are_finite(engine: Any) -> bool:
    """Whether the backward pass left only finite gradients, on every rank. Between backward and step; collective."""
    if engine.zero_optimization_stage() == 0:  # each rank has all of them, reduced
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())
    engine.optimizer.check_overflow()
    return not engine.optimizer.overflow


def take_step(engine: Any) -> None:
    """Take the step that a backward pass prepared. A step that DeepSpeed drops, because its gradients do not fit fp16's
    loss scale, counts in the schedule too: DeepSpeed would end a training before its learning rate has come down."""
    engine.step()
    if getattr(engine.optimizer, "overflow", False):
        engine.lr_scheduler.step()


def leave_out(engine: Any) -> None:
    """End a step after `gradients_are_finite` returned False: it changes no weight, and counts."""
    if engine.zero_optimization_stage() == 0:
        engine.zero_grad()
        pass_over(engine)
        return
    engine.step()  # DeepSpeed drops the gradients, which `check_overflow` has marked
    engine.optimizer.overflow = False
    engine.lr_scheduler.step()


def pass_over(engine: Any) -> None:
    """Count a step without a batch: the schedule follows the planned steps, not those taken."""
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine.micro_steps += engine.gradient_accumulation_steps()
    engine.skipped_steps += 1
    engine.lr_scheduler.step()


class Buffers:
    """A model's running statistics before a step, to be restored where its batch must not count."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [(buffer, buffer.clone()) for buffer in module.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what forward passes have done to them since."""
        for buffer, before in self._before:
            buffer.copy_(before)


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Give every rank the mean of the ranks' running statistics, so that no rank's share of the data is lost.

    They drift apart, because each rank sees its own slice; a checkpoint keeps only rank 0's.
    """
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if not buffers or dist.get_world_size() == 1:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def weights_are_finite(module: nn.Module) -> bool:
    """Whether all weights and buffers are, on every rank."""
    tensors = [*map(_own_part, module.parameters()), *module.buffers()]
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all().to(torch.uint8)
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def _own_part(parameter: Any) -> Tensor:
    """This rank's part of a weight: at ZeRO 3 its `ds_tensor`, without the uninitialised padding of the last ranks."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter  # type: ignore[no-any-return]
    part: Tensor = parameter.ds_tensor
    return part[: max(0, parameter.ds_numel - dist.get_rank() * part.numel())]
