"""What objectives exchange between ranks, on any backend: all ranks' rows with gradients, and rows passed round."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        context.rows = len(local)
        gathered = local.new_empty((dist.get_world_size() * len(local), *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss reads these rows, so their gradient is the sum over ranks. gloo has no reduce-scatter.
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        first = dist.get_rank() * context.rows
        return summed[first : first + context.rows]


def gather_rows(local: Tensor) -> Tensor:
    """(B, …) of this rank → (B · world size, …) of all ranks in their order. Every rank must call it, in step."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    gathered: Tensor = _GatherRows.apply(local)  # type: ignore[no-untyped-call]
    return gathered


@torch.no_grad()
def pass_on(local: Tensor) -> Tensor:
    """This rank's tensor goes to the next rank, the previous one's comes back. Every rank must call it, in step."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    local, received = local.contiguous(), torch.empty_like(local, memory_format=torch.contiguous_format)
    exchanges = [
        dist.P2POp(dist.isend, local, (rank + 1) % num_ranks),
        dist.P2POp(dist.irecv, received, (rank - 1) % num_ranks),
    ]
    for exchange in dist.batch_isend_irecv(exchanges):
        exchange.wait()
    return received


@torch.no_grad()
def average_buffers(module: torch.nn.Module) -> None:
    """Give every rank the mean of the ranks' running statistics, so that no rank's share of the data is lost.

    Batch statistics drift apart, each rank seeing its own slice; a checkpoint keeps only rank 0's.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def first_problem(problem: str) -> str:
    """What went wrong on the first rank on which anything did, and on which; "" where nothing did.

    Every rank must call it: so they go on, or give up, together.
    """
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {each}" for rank, each in enumerate(problems) if each), "")
