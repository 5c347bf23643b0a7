"""How deep each part of a backbone lies: what freezing and layer-wise learning rates count by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from mmflow.core.errors import RecipeError


def layers_of(backbone: Any) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of a backbone's layers (stages, where it is convolutional); None without such a list."""
    config = backbone.config
    num_layers = getattr(config, "num_hidden_layers", None) or len(getattr(config, "depths", ()))
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    return None


def depths(key: str, backbone: Any) -> tuple[dict[str, int], int]:
    """The depth of each parameter, by name, and the greatest: 0 the embeddings, 1 … L the layers, L + 1 what follows.

    Raises RecipeError naming `key` where the backbone has no list of layers to count (ALBERT's are one and the same).
    """
    found = layers_of(backbone)
    if found is None:
        raise RecipeError(f"{key}: {backbone.config.model_type} has no list of layers to count; leave it out")
    name, layers = found
    return _depths((each for each, _ in backbone.named_parameters()), name), len(layers) + 1


def _depths(names: Iterable[str], layers: str) -> dict[str, int]:
    # Registration follows the forward pass in every backbone of `transformers`: what is named before the layers feeds
    # them, what is named after them reads them.
    found: dict[str, int] = {}
    deepest = 0
    for name in names:
        if name.startswith(f"{layers}."):
            found[name] = deepest = int(name.removeprefix(f"{layers}.").split(".")[0]) + 1
        else:
            found[name] = deepest + 1 if deepest else 0
    return found


def freeze(key: str, backbone: Any, frozen: int | Literal["all"]) -> list[nn.Module]:
    """Stop training the embeddings and the first `frozen` layers, or all; the modules that stay in evaluation mode.

    A frozen norm that went on counting, or a frozen layer's dropout, would change what the layers above were promised.
    Raises RecipeError naming `key` where there are fewer layers.
    """
    if frozen == 0:
        return []
    if frozen == "all":
        backbone.requires_grad_(False)
        return [backbone]
    deep, deepest = depths(key, backbone)
    if frozen >= deepest:
        raise RecipeError(f"{key}: {frozen} of {deepest - 1} layers; give fewer, or all for the whole encoder")
    for name, parameter in backbone.named_parameters():
        if deep[name] <= frozen:
            parameter.requires_grad_(False)
    # Modules that hold nothing but what is frozen; a dropout holds nothing, and follows the module it stands in.
    return [module for module in backbone.modules() if _frozen(module)]


def _frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
