"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear layers of a trained model, and merging them into it.

`peft` wraps single linear layers. Encoders, fusion and decoder run unchanged, ZeRO-3 gathers each matrix in the forward
of its module, and a package contains nothing of `peft`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.config import LoraConfig
from mmflow.models.encoders import Encoder
from mmflow.models.model import Model

ADAPTED = ("image", "text", "similarity", "fusion", "decoder")
ADAPTER, BASE = ".lora_", ".base_layer."  # in names that `peft` gives
NAME = "default"


def adapt(key: str, model: Model, config: LoraConfig, fresh: Collection[str], seed: int) -> None:
    """Add adapters, which change nothing at first, and freeze everything except them, `fresh` and what the recipe
    names; frozen batch norms keep their statistics. `key` is the recipe's, for errors; raises as `check_lora`.
    """
    targets = check_lora(key, model, config, fresh)
    in_full = _trained_in_full(key, model, config, fresh)
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by the rank; it need not be an int
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # so that a restart from the first step draws the same
        inject_adapter_in_model(settings, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER in name or name in in_full)
    for encoder in model.modules():
        if isinstance(encoder, Encoder):
            encoder.freeze_statistics()


def check_lora(key: str, model: Model, config: LoraConfig, fresh: Collection[str]) -> list[str]:
    """The names of the linear layers that get adapters: those with trained weights that are neither frozen nor trained
    in full.

    Raises RecipeError if `peft` is not installed, and for a name that matches nothing. `key` is the recipe's.
    """
    if find_spec("peft") is None:
        raise RecipeError(f"{key}: it needs peft, which is not installed: pip install 'mmflow[lora]', or leave it out")
    in_full = _trained_in_full(key, model, config, fresh)
    linear = [
        name
        for name, module in model.named_modules()
        # Exactly this class: nn.MultiheadAttention reads the weight of its own subclass without calling it.
        if type(module) is nn.Linear
        and module.weight.requires_grad
        and _is_in(name, ADAPTED)
        and f"{name}.weight" not in in_full
    ]
    for number, target in enumerate(config.targets):
        if not any(_ends_with(name, target) for name in linear):
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise RecipeError(
                f"{key}.targets.{number}: no trained, unfrozen linear layer has a name that ends in {target!r}; there "
                f"are {ends}"
            )
    targets = [name for name in linear if not config.targets or any(_ends_with(name, end) for end in config.targets)]
    if not targets:
        raise RecipeError(f"{key}: the model has no linear layer with trained, unfrozen weights; leave it out")
    return targets


def merged(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The state of the model without adapters: each adapted matrix W becomes W + alpha / rank · B A (equation 3)."""
    plain = {}
    for name, tensor in state.items():
        if ADAPTER in name:
            continue
        if name.endswith(f"{BASE}weight"):
            layer = name.removesuffix(f"{BASE}weight")
            down, up = (state[f"{layer}{ADAPTER}{matrix}.{NAME}.weight"] for matrix in "AB")
            tensor = tensor + config.alpha / config.rank * (up @ down)
        plain[name.replace(BASE, ".")] = tensor
    return plain


def adapter_count(model: Model) -> int:
    """The number of scalars in the adapters, which `merged` removes."""
    adapters = (parameter for name, parameter in model.named_parameters() if ADAPTER in name)
    return sum(getattr(adapter, "ds_numel", adapter.numel()) for adapter in adapters)


def _trained_in_full(key: str, model: Model, config: LoraConfig, fresh: Collection[str]) -> set[str]:
    """The parameters that are trained without adapters."""
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.trained is None:
        named = {name for name in parameters if not _is_in(name, ADAPTED)}
    else:
        for number, part in enumerate(config.trained):
            if not any(_is_in(name, [part]) for name in parameters):
                raise RecipeError(
                    f"{key}.trained.{number}: no unfrozen parameter has a name that starts with {part!r}; there are "
                    f"{', '.join(sorted({name.split('.')[0] for name in parameters}))}"
                )
        named = {name for name in parameters if _is_in(name, config.trained)}
    return named | {name for name in parameters if _is_in(name, fresh)}


def _is_in(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
