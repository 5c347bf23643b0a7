"""Where parameters lie in what an optimizer steps: under ZeRO that is no parameter but a flat tensor, a rank's part of
many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """What this rank holds of a parameter."""

    shape: torch.Size  # the whole parameter's
    start: int  # the fragment's first element in the parameter, which is read as flat
    numel: int  # 0 where the rank holds nothing of it
    offset: int  # the fragment's first element in the flat tensor

    def of(self, flat: Tensor) -> Tensor:
        """The fragment, a view of a tensor laid out as the flat one."""
        return flat.narrow(0, self.offset, self.numel)

    def whole(self, flat: Tensor, device: torch.device) -> Tensor:
        """The parameter's elements of all ranks, (shape), on `device`. Collective: exact, because each element comes
        from one rank and zeros from all others."""
        whole = torch.zeros(self.shape.numel(), dtype=flat.dtype, device=device)
        whole.narrow(0, self.start, self.numel).copy_(self.of(flat))
        dist.all_reduce(whole)
        return whole.view(self.shape)


def fragments_of(engine: Any) -> dict[Tensor, list[Fragment]]:
    """By flat tensor the parameters that it has a part of, in one order on every rank; empty at ZeRO 0, where an
    optimizer steps the parameters themselves."""
    return {flat: [_fragment(engine, parameter) for parameter in group] for flat, group in _groups(engine)}


def places_of(engine: Any) -> dict[Tensor, tuple[Tensor, Fragment]]:
    """By parameter the flat tensor that has a part of it, and where; empty at ZeRO 0."""
    return {parameter: (flat, _fragment(engine, parameter)) for flat, group in _groups(engine) for parameter in group}


def _groups(engine: Any) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return iter(())
    if stage < 3:
        return zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    return zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)


def _fragment(engine: Any, parameter: Tensor) -> Fragment:
    if engine.zero_optimization_stage() < 3:
        return _of_flat_group(parameter)
    return _of_parameter(engine.optimizer, parameter)


def _of_flat_group(parameter: Any) -> Fragment:
    """ZeRO 1 and 2 cut a group's parameters, laid end to end, into as many parts as there are ranks."""
    held = parameter._hp_mapping
    if held is None:
        return Fragment(parameter.shape, 0, 0, 0)
    here, there = held.lp_fragment_address, held.hp_fragment_address
    return Fragment(parameter.shape, here.start, here.numel, there.start)


def _of_parameter(zero: Any, parameter: Any) -> Fragment:
    """ZeRO 3 cuts each parameter, the last part padded to the size of the others."""
    _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = min(dist.get_rank() * size, parameter.ds_numel)
    return Fragment(parameter.ds_shape, start, min(size, parameter.ds_numel - start), offset)
