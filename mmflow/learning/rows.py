"""The rows of a global batch: which are real, means over the rows of all ranks, random numbers and hashes of a row, and
exchanges between ranks.

A mean here is one rank's part: the average of the parts over ranks is the mean over the whole batch, in value and
gradient, because DeepSpeed averages gradients over ranks. With micro-batches each of them has a part, and DeepSpeed
averages over those too. Padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Shapes: B rows of this rank, N rows of all ranks, P places of this rank: rows, or tokens of rows; V classes or words;
# T tokens; C random numbers of a row.

Gather = Callable[[Tensor], Tensor]
"""(B, …) of this rank → (N, …) of all ranks in their order, with gradients; the identity where there is one rank."""

RingShift = Callable[[Tensor], Tensor]
"""Sends this rank's tensor to the next rank and returns the previous one's, without gradients; the identity where there
is one rank."""


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Ranks:
    """How this rank exchanges tensors with the others; by default there are none."""

    rank: int = 0
    gather: Gather = _identity
    ring_shift: RingShift = _identity


ALONE = Ranks()


@dataclass(frozen=True)
class GlobalRows:
    """The place of this rank's rows in the global batch, and which rows are real rather than padding."""

    real_B: Tensor  # bool
    real_N: Tensor  # bool
    first: int  # the number of this rank's first row among the N
    num_parts: int | None = None  # of a mean: the micro-batches of all ranks, if these rows are one; None: one a rank

    @property
    def columns_B(self) -> Tensor:
        """(B,) int64: the number of each row in the global batch."""
        return torch.arange(self.first, self.first + len(self.real_B), device=self.real_B.device)

    @property
    def num_ranks(self) -> int:
        """How many ranks share the batch."""
        return len(self.real_N) // len(self.real_B)

    @property
    def row_weight(self) -> Tensor:
        """The weight of one real row in this rank's part of the mean over all real rows, ()."""
        # Clamped for a batch in which every sample was skipped as corrupt.
        return (self.num_parts or self.num_ranks) / self.real_N.sum().clamp(min=1)

    def zeros(self) -> Tensor:
        """(B,) fp32 zeros."""
        return torch.zeros_like(self.real_B, dtype=torch.float32)

    def mean(self, values_B: Tensor) -> Tensor:
        """This rank's part of the mean over all real rows."""
        return values_B.masked_fill(~self.real_B, 0.0).sum() * self.row_weight

    def micro_batch(self, cut: slice, num_micro_batches: int) -> GlobalRows:
        """The rows of one micro-batch."""
        num_parts = self.num_ranks * num_micro_batches
        return GlobalRows(self.real_B[cut], self.real_N, self.first + cut.start, num_parts)


def global_rows(real_B: Tensor, ranks: Ranks = ALONE) -> GlobalRows:
    """Exchange which rows are real, once a batch. Collective."""
    return GlobalRows(real_B, ranks.gather(real_B.to(torch.uint8)).bool(), ranks.rank * len(real_B))


def mean_of(values_P: Tensor, gather: Gather) -> Tensor:
    """This rank's part of the mean over the places of all ranks, 0 if there are none. Ranks may differ in their number.

    Not the mean of the ranks' means, in which a token would weigh more on a rank with few.
    """
    counts_R = gather(torch.tensor([values_P.numel()], device=values_P.device))
    return values_P.sum() * (len(counts_R) / counts_R.sum().clamp(min=1))


def mean_cross_entropy(
    logits: Tensor, targets: Tensor, where: Tensor, gather: Gather, label_smoothing: float = 0.0
) -> Tensor:
    """This rank's part of the mean of −log softmax(logits)[target] over the places of all ranks where `where` is true.

    `logits` are (…, V), `targets` (…) int64 and `where` (…) bool; other targets may be anything. With smoothing ε
    the target is (1 − ε) of the class and ε spread over all (arXiv 1512.00567, section 7).
    """
    losses_P = torch.nn.functional.cross_entropy(
        logits[where].float(), targets[where], reduction="none", label_smoothing=label_smoothing
    )
    return mean_of(losses_P, gather)


# --- random numbers and hashes ----------------------------------------------------------------------------------------

_LOW_32_BITS = 0xFFFFFFFF


def draw_seed(generator: torch.Generator) -> int:
    """The seed of one draw, the same on every rank if the generators are in the same state."""
    return int(torch.randint(1 << 32, (), generator=generator, device=generator.device))


def uniform(seed: int, rows_B: Tensor, num_columns: int) -> Tensor:
    """(B, C) fp32 in the open interval (0, 1), a function of nothing but the seed, the row's number and the column.

    So a row of the global batch has the same numbers on any rank and with any padding.
    """
    columns_C = torch.arange(num_columns, device=rows_B.device)
    hashed_BC = _scatter(_scatter(_scatter(rows_B) ^ seed)[:, None] ^ _scatter(columns_C + 0x9E3779B9))
    # 23 bits plus a half: of all 32 bits the highest number would round to 1 in fp32.
    return ((hashed_BC >> 9) + 0.5) * 2.0**-23


def text_hashes(token_ids_BT: Tensor, token_mask_BT: Tensor) -> Tensor:
    """(B,) int64, equal for equal texts with any padding, and different for others but for chance."""
    places_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    factors_T = (_scatter(places_T) << 32) + _scatter(places_T + (1 << 31))
    return ((token_ids_BT + 1) * factors_T * token_mask_BT).sum(1)


def _scatter(values: Tensor) -> Tensor:
    """A bijection of 32-bit integers that scatters neighbours (MurmurHash3's finaliser), held in int64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = values & _LOW_32_BITS
        values = (values ^ (values >> shift)) * factor
    values = values & _LOW_32_BITS
    return values ^ (values >> 16)


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
def ring_shift(local: Tensor) -> Tensor:
    """Send this rank's tensor to the next rank and return the previous one's. Every rank must call it, in step."""
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


def all_ranks() -> Ranks:
    """The ranks of the process group."""
    return Ranks(dist.get_rank() if dist.is_initialized() else 0, gather_rows, ring_shift)
