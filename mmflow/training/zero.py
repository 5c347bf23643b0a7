"""Where parameters lie in the flat tensors that ZeRO's optimizers step, and loading them on another number of ranks.

A checkpoint is resharded here because no library does it. DeepSpeed's `ds_to_universal` knows Adam's two moments and
loses every other state, a running average among them; at ZeRO 3 it gives all parameter groups the weight decay of the
first; and it writes the whole state once more. `torch.distributed.checkpoint` knows nothing of ZeRO's flat tensors,
which would have to be mapped as they are here; it keeps no checksums, and it unpickles its metadata.
"""

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

MASTER = "master"
CHUNK = 1 << 18  # elements hashed at once: 2 MiB of int64 stay in a cache, which takes an eighth of the time
# Odd numbers of many ones and zeros: the golden ratio, and the finaliser of MurmurHash3.
GOLDEN, MURMUR_1, MURMUR_2 = -7046029254386353131, -49064778989728563, -4265267296055464877


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter, within a flat tensor."""

    shape: torch.Size  # the whole parameter's
    start: int  # the part's first element in the flattened parameter
    numel: int  # 0 where the rank has nothing of it
    offset: int  # the part's first element in the flat tensor

    def of(self, flat: Tensor) -> Tensor:
        """The part, as a view of a tensor laid out like the flat one."""
        return flat.narrow(0, self.offset, self.numel)

    def whole(self, flat: Tensor, device: torch.device) -> Tensor:
        """The parameter's elements from all ranks, (shape), on `device`. Exact, because each element comes from one
        rank and zeros from all others. Collective."""
        whole = torch.zeros(self.shape.numel(), dtype=flat.dtype, device=device)
        whole.narrow(0, self.start, self.numel).copy_(self.of(flat))
        dist.all_reduce(whole)
        return whole.view(self.shape)


def flat_groups(engine: Any) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """The flat tensors that this rank's optimizer steps, and the parameters with a part in each; none at ZeRO 0."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return iter(())
    if stage < 3:
        return zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    return zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)


def places_of(engine: Any) -> dict[Tensor, tuple[Tensor, Fragment]]:
    """By parameter the flat tensor with its part and the fragment there, in the same order on every rank; empty at
    ZeRO 0, where an optimizer steps the parameters themselves."""
    groups = flat_groups(engine)
    return {parameter: (flat, _fragment(engine, parameter)) for flat, group in groups for parameter in group}


def _fragment(engine: Any, parameter: Any) -> Fragment:
    if engine.zero_optimization_stage() < 3:
        # A group's parameters, laid end to end, are cut into as many parts as there are ranks.
        mapping = parameter._hp_mapping
        if mapping is None:
            return Fragment(parameter.shape, 0, 0, 0)
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(parameter.shape, here.start, here.numel, there.start)
    # ZeRO 3 cuts each parameter, and pads the last part to the size of the others.
    zero = engine.optimizer
    _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = min(dist.get_rank() * size, parameter.ds_numel)
    return Fragment(parameter.ds_shape, start, min(size, parameter.ds_numel - start), offset)


# --- what a rank holds, and its hash --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A tensor that this rank's optimizer steps, its states, and the named parameters in it."""

    flat: Tensor
    states: Mapping[str, Tensor]
    pieces: tuple[tuple[str, Fragment], ...]

    def elementwise(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors with an element for each of the flat tensor's: the master and the states, by name."""
        yield MASTER, self.flat
        yield from ((name, value) for name, value in self.states.items() if _is_elementwise(value))


def held(engine: Any) -> list[Held]:
    """The tensors that this rank's optimizer steps. At ZeRO 0 every rank holds all of them."""
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
    states = engine.optimizer.optimizer.state
    return [
        Held(flat, states[flat], tuple((names[parameter], _fragment(engine, parameter)) for parameter in group))
        for flat, group in flat_groups(engine)
    ]


def layout(engine: Any) -> list[list[tuple[str, int, int, int]]]:
    """What this rank's files do not say: for each flat tensor the parameters' (name, first element in the parameter,
    number of elements, first element in the flat tensor)."""
    if engine.zero_optimization_stage() == 0:
        return []
    return [[(name, part.start, part.numel, part.offset) for name, part in tensor.pieces] for tensor in held(engine)]


def state_hash(engine: Any) -> str:
    """Hash of the fp32 masters and the optimizer's states, by name and element (16 hex digits). It is the same on any
    number of ranks, so that a loaded state can be compared with the saved one. Nothing is gathered. Collective."""
    total = torch.zeros(1, dtype=torch.int64, device=engine.device)
    if engine.zero_optimization_stage() > 0 or dist.get_rank() == 0:
        for tensor in held(engine):
            for state, flat in tensor.elementwise():
                for name, fragment in tensor.pieces:
                    part = element_hash(f"{name}/{state}", fragment.of(flat.reshape(-1)), fragment.start)
                    total += part.to(total.device)
    dist.all_reduce(total)
    return f"{int(total) % 2**64:016x}"


def element_hash(name: str, values: Tensor, start: int) -> Tensor:
    """A sum over elements, each hashed with its place, so that the hashes of a tensor's parts add up to the whole's.
    int64 wraps round."""
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


def _is_elementwise(value: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


# --- loading on another number of ranks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _OldPiece:
    """A parameter's part in the files of one of the ranks that saved it."""

    tensors: Mapping[str, Tensor]  # the flat master and its states, by name
    start: int
    numel: int
    offset: int


def load_reshaped(engine: Any, parts: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Load masters, states, schedule and counts that another number of ranks saved, at ZeRO 1 to 3. Each rank maps the
    old files and reads only the elements that it holds. Collective.

    `parts` are the published parts of the old ranks, in order; their files are under `directory`.
    """
    files = [_load(directory, part, "optim_states.pt")["optimizer_state_dict"] for part in parts]
    stage = engine.zero_optimization_stage()
    old: dict[str, list[_OldPiece]] = defaultdict(list)
    for file, part in zip(files, parts, strict=True):
        for tensors, group in zip(_flat_tensors(file, stage), part["facts"]["layout"], strict=True):
            for name, *place in group:
                old[name].append(_OldPiece(tensors, *place))

    zero = engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()  # leaves each rank its part of the parameters that ZeRO keeps whole
    groups = _torch_optimizer(files[0], stage)["param_groups"]
    is_fused = any(group.get("fused") for group in groups)
    for tensor in held(engine):
        new = {
            state: torch.zeros_like(tensor.flat, dtype=value.dtype) if _is_elementwise(value) else value.clone()
            for state, value in old[tensor.pieces[0][0]][0].tensors.items()
        }
        if is_fused:
            new["step"] = new["step"].to(tensor.flat.device)  # where torch's fused AdamW counts
        for state, value in new.items():
            for name, fragment in tensor.pieces if _is_elementwise(value) else ():
                _fill(fragment.of(value), fragment.start, state, old[name])
        tensor.flat.data.copy_(new.pop(MASTER))
        zero.optimizer.state[tensor.flat] = new

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


def _fill(target: Tensor, start: int, state: str, pieces: Sequence[_OldPiece]) -> None:
    """Fill a parameter's elements from `start` on, (n,), from the ranks that had them."""
    for piece in pieces:
        begin, end = max(start, piece.start), min(start + len(target), piece.start + piece.numel)
        if begin < end:
            first = piece.offset + begin - piece.start
            target[begin - start : end - start].copy_(piece.tensors[state][first : first + end - begin])


def _flat_tensors(file: Mapping[str, Any], stage: int) -> list[Mapping[str, Tensor]]:
    """A rank's flat masters with their states, in the order of its layout."""
    masters = file["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    states = _torch_optimizer(file, stage)["state"]
    return [{MASTER: master, **states[number]} for number, master in enumerate(masters)]


def _torch_optimizer(file: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """The state of the optimizer that ZeRO wraps."""
    state: dict[str, Any] = file["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    return state


def _load(directory: Path, part: Mapping[str, Any], ending: str) -> dict[str, Any]:
    """One of a rank's files, mapped: what is not used is not read."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = next(name for name in part["files"] if name.endswith(ending))
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        loaded: dict[str, Any] = torch.load(directory / name, map_location="cpu", mmap=True, weights_only=True)
    return loaded
