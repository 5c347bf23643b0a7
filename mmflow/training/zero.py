"""Where parameters lie in what an optimizer steps: under ZeRO that is no parameter but a flat tensor, a rank's part of
many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
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


MASTER = "master"
CHUNK = 1 << 18  # elements that are hashed at once: 2 MiB of int64 stay in a cache, which takes an eighth of the time
# Odd numbers of many ones and zeros: the golden ratio, and the finaliser of MurmurHash3.
GOLDEN, MURMUR_1, MURMUR_2 = -7046029254386353131, -49064778989728563, -4265267296055464877


@dataclass(frozen=True)
class Held:
    """A tensor that this rank's optimizer steps, its states, and where parameters lie in it."""

    flat: Tensor
    states: Mapping[str, Tensor]
    pieces: tuple[tuple[str, Fragment], ...]

    def elementwise(self) -> Iterator[tuple[str, Tensor]]:
        """What has an element for each of the flat tensor's: the master and the states, by name."""
        yield MASTER, self.flat
        yield from ((name, value) for name, value in self.states.items() if _is_elementwise(value))


def held(engine: Any) -> list[Held]:
    """What this rank holds. At ZeRO 0 that is all, on every rank."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 0:
        return [
            Held(
                parameter.detach(),
                engine.optimizer.state[parameter],
                ((names[parameter], Fragment(parameter.shape, 0, parameter.numel(), 0)),),
            )
            for group in engine.optimizer.param_groups
            for parameter in group["params"]
        ]
    zero = engine.optimizer
    groups = zero.bit16_groups if engine.zero_optimization_stage() < 3 else zero.fp16_groups
    return [
        Held(flat, zero.optimizer.state[flat], tuple(zip((names[each] for each in group), fragments, strict=True)))
        for (flat, fragments), group in zip(fragments_of(engine).items(), groups, strict=True)
    ]


def layout(engine: Any) -> list[list[tuple[str, int, int, int]]]:
    """What the files of this rank do not say of themselves: for each flat tensor the parameters' (name, first element
    in the parameter, elements, first element in the flat tensor)."""
    if engine.zero_optimization_stage() == 0:
        return []
    return [[(name, each.start, each.numel, each.offset) for name, each in one.pieces] for one in held(engine)]


def state_hash(engine: Any) -> str:
    """Of the fp32 masters and the optimizer's states, by name and element (16 hex digits): the same on any number of
    ranks, so that what was loaded can be compared with what was saved. Collective; nothing is gathered."""
    total = torch.zeros(1, dtype=torch.int64, device=engine.device)
    if engine.zero_optimization_stage() > 0 or dist.get_rank() == 0:
        for one in held(engine):
            for state, flat in one.elementwise():
                for name, fragment in one.pieces:
                    mine = element_hash(f"{name}/{state}", fragment.of(flat.reshape(-1)), fragment.start)
                    total += mine.to(total.device)
    dist.all_reduce(total)
    return f"{int(total) % 2**64:016x}"


def element_hash(name: str, values: Tensor, start: int) -> Tensor:
    """A sum over elements, of each with its place: parts of a tensor add up to the whole. int64 wraps round."""
    seed = xxhash.xxh3_64_intdigest(name.encode()) - 2**63
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, values.numel(), CHUNK):
        chunk = values[first : first + CHUNK].detach().float()
        place = torch.arange(start + first, start + first + len(chunk), device=values.device)
        mixed = (chunk.view(torch.int32).long() ^ (place * GOLDEN)) + seed
        for factor in (MURMUR_1, MURMUR_2):
            mixed = (mixed ^ (mixed >> 33)) * factor
        total += (mixed ^ (mixed >> 33)).sum()
    return total


def load_reshaped(engine: Any, parts: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Load what ranks of another number saved, by ZeRO 1 to 3: masters, states, schedule and counts. Collective.

    `parts` are theirs, in order; their files lie under `directory`.
    """
    files = [_load(directory, part, "optim_states.pt")["optimizer_state_dict"] for part in parts]
    stage = engine.zero_optimization_stage()
    old = [_flats(each, stage) for each in files]
    pieces: dict[str, list[tuple[int, int, int, int, int]]] = defaultdict(list)
    for rank, part in enumerate(parts):
        for number, group in enumerate(part["facts"]["layout"]):
            for name, *place in group:
                pieces[name].append((rank, number, *place))

    zero = engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()  # leaves each rank its part of the parameters that ZeRO keeps whole
    groups = _optimizer(files[0], stage)["param_groups"]
    is_fused = any(group.get("fused") for group in groups)
    for one in held(engine):
        rank, number, *_ = pieces[one.pieces[0][0]][0]
        masters, states = old[rank]
        wanted: dict[str, Tensor] = {MASTER: masters[number], **states[number]}
        new = {
            state: torch.zeros_like(one.flat, dtype=value.dtype) if _is_elementwise(value) else value.clone()
            for state, value in wanted.items()
        }
        if is_fused:
            new["step"] = new["step"].to(one.flat.device)  # where torch's fused AdamW counts
        for name, fragment in one.pieces:
            for state, value in new.items():
                if _is_elementwise(value):
                    _fill(fragment.of(value), fragment.start, state, pieces[name], old)
        one.flat.data.copy_(new.pop(MASTER))
        zero.optimizer.state[one.flat] = new

    for group, saved in zip(zero.optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    if stage == 3:
        flats = zero.fp32_partitioned_groups_flat
        zero._rigid_load_state_dict({**files[0], "fp32_flat_groups": flats}, load_optimizer_states=False)
        zero.checkpoint_event_epilogue()
    else:
        zero.loss_scaler = files[0]["loss_scaler"]
        zero.update_lp_params()

    model = _load(directory, parts[0], "model_states.pt")
    engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = model["global_steps"], model["skipped_steps"]
    engine.global_samples = model["global_samples"]


def _fill(
    target: Tensor,
    start: int,
    state: str,
    pieces: Sequence[tuple[int, int, int, int, int]],
    old: Sequence[tuple[Sequence[Tensor], Sequence[Mapping[str, Tensor]]]],
) -> None:
    """Fill a parameter's elements from `start` on, (n,), from the ranks that had them."""
    for rank, number, first, numel, offset in pieces:
        begin, end = max(start, first), min(start + len(target), first + numel)
        if begin < end:
            masters, states = old[rank]
            source = masters[number] if state == MASTER else states[number][state]
            target[begin - start : end - start].copy_(source[offset + begin - first : offset + end - first])


def _flats(file: Mapping[str, Any], stage: int) -> tuple[Sequence[Tensor], Sequence[Mapping[str, Tensor]]]:
    """A rank's flat masters and their states, in the order of its layout."""
    masters = file["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    states = _optimizer(file, stage)["state"]
    return masters, [states[number] for number in range(len(masters))]


def _optimizer(file: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """The state of the optimizer that ZeRO wraps, as torch has it."""
    found: dict[str, Any] = file["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    return found


def _is_elementwise(value: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _load(directory: Path, part: Mapping[str, Any], ending: str) -> dict[str, Any]:
    """One of the files of a rank, mapped: what is not used is not read."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = next(name for name in part["files"] if name.endswith(ending))
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        loaded: dict[str, Any] = torch.load(directory / name, map_location="cpu", mmap=True, weights_only=True)
    return loaded
