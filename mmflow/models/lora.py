"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear layers of a trained model, and the model that they
become part of.

`peft` puts them in; only the layer that it wraps knows of them, so that encoders, fusion and decoder run as they are,
ZeRO-3 gathers each matrix in the forward of its module, and nothing of `peft` is left in a package.
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
ADAPTER, BASE = ".lora_", ".base_layer."  # within names that `peft` gives
NAME = "default"


def adapt(key: str, model: Model, config: LoraConfig, fresh: Collection[str], seed: int) -> None:
    """Leave of the model to be trained adapters, which at first change nothing, what is `fresh`, and what the recipe
    names; all else is frozen, running statistics too. `key` is the recipe's, for errors; raises as `check_lora`.
    """
    targets = check_lora(key, model, config, fresh)
    whole = _trained(key, model, config, fresh)
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # whole or not, it is divided by the rank
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a restart from the first step must draw the same
        inject_adapter_in_model(settings, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER in name or name in whole)
    for encoder in model.modules():
        if isinstance(encoder, Encoder):
            encoder.freeze_statistics()


def check_lora(key: str, model: Model, config: LoraConfig, fresh: Collection[str]) -> list[str]:
    """The names of the linear layers that get adapters: those that are trained already, and neither frozen nor trained
    in full.

    Raises RecipeError where `peft` is not installed, and for a name that matches nothing. `key` is the recipe's.
    """
    if find_spec("peft") is None:
        raise RecipeError(f"{key}: it needs peft, which is not installed: pip install 'mmflow[lora]', or leave it out")
    whole = _trained(key, model, config, fresh)
    linear = [
        name
        for name, module in model.named_modules()
        # Of this very class: an nn.MultiheadAttention reads the weight of its own kind without a call.
        if type(module) is nn.Linear
        and module.weight.requires_grad
        and _is_in(name, ADAPTED)
        and f"{name}.weight" not in whole
    ]
    for number, target in enumerate(config.targets):
        if not any(_ends_with(name, target) for name in linear):
            some = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise RecipeError(
                f"{key}.targets.{number}: {target!r} ends the name of no linear layer that is trained already and not "
                f"frozen; there are {some}"
            )
    targets = [name for name in linear if not config.targets or any(_ends_with(name, each) for each in config.targets)]
    if not targets:
        raise RecipeError(f"{key}: the model has no linear layer that is trained already and not frozen; leave it out")
    return targets


def merged(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The state of the model without adapters: each matrix W of theirs is W + alpha / rank · B A (equation 3)."""
    plain = {}
    for name, tensor in state.items():
        if ADAPTER in name:
            continue
        if name.endswith(f"{BASE}weight"):
            layer = name.removesuffix(f"{BASE}weight")
            down, up = (state[f"{layer}{ADAPTER}{each}.{NAME}.weight"] for each in "AB")
            tensor = tensor + config.alpha / config.rank * (up @ down)
        plain[name.replace(BASE, ".")] = tensor
    return plain


def adapter_count(model: Model) -> int:
    """The number of scalars in the adapters, which `merged` makes part of others."""
    return sum(getattr(each, "ds_numel", each.numel()) for name, each in model.named_parameters() if ADAPTER in name)


def _trained(key: str, model: Model, config: LoraConfig, fresh: Collection[str]) -> set[str]:
    """The parameters that are trained as they are, without adapters."""
    parameters = {name for name, each in model.named_parameters() if each.requires_grad}
    if config.trained is None:
        named = {name for name in parameters if not _is_in(name, ADAPTED)}
    else:
        for number, part in enumerate(config.trained):
            if not any(_is_in(name, [part]) for name in parameters):
                raise RecipeError(
                    f"{key}.trained.{number}: {part!r} begins the name of nothing that is not frozen; there are "
                    f"{', '.join(sorted({name.split('.')[0] for name in parameters}))}"
                )
        named = {name for name in parameters if _is_in(name, config.trained)}
    return named | {name for name in parameters if _is_in(name, fresh)}


def _is_in(name: str, modules: Collection[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in modules)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
