"""Which rows of a global batch are real, and means over all ranks in which padding counts nowhere.

A mean here is a rank's part: the mean over ranks of the parts is the mean over the whole batch, in value and gradient,
because DeepSpeed averages gradients over ranks. Where a rank's rows come in micro-batches it averages over these too,
and each has a part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Shapes: B rows of this rank, N rows of all ranks, P places of this rank: rows, or tokens of rows; V classes or words.

Gather = Callable[[Tensor], Tensor]
"""(B, …) of this rank → (N, …) of all ranks in their order, with gradients; the identity where there is one rank."""

PassOn = Callable[[Tensor], Tensor]
"""This rank's tensor goes to the next rank and the previous one's comes back, without gradients; the identity where
there is one rank."""


@dataclass(frozen=True)
class GlobalRows:
    """Where this rank's rows stand in the global batch, and which rows are real rather than padding."""

    real_B: Tensor  # bool
    real_N: Tensor  # bool
    first: int  # the first of this rank's rows among the N
    parts: int | None = None  # of the loss, over all ranks, where these rows are a micro-batch; else one a rank

    @property
    def columns_B(self) -> Tensor:
        """(B,) int64: the column that belongs to each row."""
        return torch.arange(self.first, self.first + len(self.real_B), device=self.real_B.device)

    @property
    def num_ranks(self) -> int:
        """How many ranks share the batch."""
        return len(self.real_N) // len(self.real_B)

    @property
    def share(self) -> Tensor:
        """What a real row weighs in this rank's part of the mean over all real rows, ()."""
        # Clamped for a batch of which every sample was skipped as corrupt.
        return (self.parts or self.num_ranks) / self.real_N.sum().clamp(min=1)

    def mean(self, values_B: Tensor) -> Tensor:
        """This rank's part of the mean over all real rows."""
        return values_B.masked_fill(~self.real_B, 0.0).sum() * self.share

    def micro_batch(self, where: slice, num_micro_batches: int) -> GlobalRows:
        """Some of this rank's rows, one of the micro-batches that they come in."""
        parts = self.num_ranks * num_micro_batches
        return GlobalRows(self.real_B[where], self.real_N, self.first + where.start, parts)


def global_rows(real_B: Tensor, gather: Gather, rank: int) -> GlobalRows:
    """Exchange which rows are real, once a batch."""
    return GlobalRows(real_B, gather(real_B.to(torch.uint8)).bool(), rank * len(real_B))


def mean_of(values_P: Tensor, gather: Gather) -> Tensor:
    """This rank's part of the mean over the places of all ranks, which may have any number each; 0 if none has any.

    Not the mean of the ranks' means: a token would weigh more on a rank that has few.
    """
    counts_R = gather(torch.tensor([values_P.numel()], device=values_P.device))
    return values_P.sum() * (len(counts_R) / counts_R.sum().clamp(min=1))


def mean_cross_entropy(
    logits: Tensor, targets: Tensor, where: Tensor, gather: Gather, label_smoothing: float = 0.0
) -> Tensor:
    """This rank's part of the mean of −log softmax(logits)[target] over the places of all ranks where `where` is true.

    `logits` are (…, V), `targets` (…) int64 and `where` (…) bool; targets elsewhere may be anything. With smoothing ε
    the target is (1 − ε) of the class and ε spread over all (arXiv 1512.00567, section 7).
    """
    losses_P = torch.nn.functional.cross_entropy(
        logits[where].float(), targets[where], reduction="none", label_smoothing=label_smoothing
    )
    return mean_of(losses_P, gather)


# --- exchanges between ranks ------------------------------------------------------------------------------------------


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
