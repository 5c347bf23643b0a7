"""Backbones of `transformers`: built from a type and its options or from a local directory, and how deep their layers
lie. Nothing is downloaded, no code that comes with a checkpoint is run, and no pickle is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from mmflow.core.errors import RecipeError
from mmflow.loading.tokens import LAST, PAD, SPECIAL
from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig
from mmflow.models.pretrained import (
    DUAL,
    checkpoint_config,
    fit_pixels,
    fit_vocabulary,
    load_weights,
    nearest,
    one_line,
    option_errors,
)

SideConfig = ImageEncoderConfig | TextEncoderConfig

# Ids in the tokenizer that mmflow trains. A fresh backbone for another tokenizer gets that one's ids as options.
OWN_IDS = {"pad_token_id": SPECIAL.index(PAD), "eos_token_id": SPECIAL.index(LAST)}


def encoder_config(key: str, config: SideConfig, *, image_pixels: int = 0, vocabulary_size: int = 0) -> Any:
    """The checked `transformers` configuration of an encoder, or of a checkpoint's tower. Creates no weights.

    `key` is the recipe's key, for errors. Raises RecipeError for an unknown type, for an option that the type does not
    have (`transformers` accepts any word and silently uses the default), and for a directory without a configuration.
    """
    if config.checkpoint is not None:
        whole = checkpoint_config(key, config.checkpoint)
        settings = getattr(whole, f"{_side(config)}_config") if whole.model_type in DUAL else whole
        return _with_options(key, settings, settings.to_dict(), config.options)
    from transformers import CONFIG_MAPPING

    model_type = str(config.type)
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(f"{key}.type: transformers has no {model_type!r}{nearest(model_type, CONFIG_MAPPING.keys())}")
    settings = CONFIG_MAPPING[model_type]()
    derived = {"image_size": image_pixels or None, "vocab_size": vocabulary_size or None, **OWN_IDS}
    known = settings.to_dict()
    fields = {name: value for name, value in derived.items() if name in known and value is not None}
    return _with_options(key, settings, fields, config.options)


def load_backbone(key: str, config: SideConfig, *, image_pixels: int = 0, vocabulary_size: int = 0) -> Any:
    """A `PreTrainedModel` in fp32, fresh or a checkpoint's tower; its `last_hidden_state` is the encoder's sequence.

    Parts that `config.pooling` does not read are left out: parameters without gradients would still be all-reduced and
    saved. Raises RecipeError as `encoder_config` does, for weights that are missing, do not fit or are a pickle, and
    for a vocabulary other than the checkpoint's.
    """
    settings = encoder_config(key, config, image_pixels=image_pixels, vocabulary_size=vocabulary_size)
    _check_kind(key, config, settings)
    if config.checkpoint is None:
        backbone = _fresh(key, config, settings)
        _drop_unread(backbone, config.pooling)
        return backbone
    tower = f"{_side(config)}_model"
    backbone, missing = load_weights(key, config.checkpoint, settings, _model_class, tower)
    if image_pixels:  # before unread parts are dropped, which a refitted backbone has again
        backbone = fit_pixels(key, backbone, image_pixels)
    _drop_unread(backbone, config.pooling)
    if lacking := sorted(missing & set(backbone.state_dict())):
        raise RecipeError(
            f"{key}.checkpoint: {config.checkpoint} lacks {lacking[0]} and {len(lacking) - 1} other weights of "
            f"{settings.model_type}; save the whole model there"
        )
    if vocabulary_size:
        fit_vocabulary(key, config.checkpoint, backbone, vocabulary_size)
    return backbone


def _side(config: SideConfig) -> str:
    return "vision" if isinstance(config, ImageEncoderConfig) else "text"


def _with_options(key: str, config: Any, fields: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    model_type, known = config.model_type, config.to_dict()
    for option in options:
        if option not in known:
            raise RecipeError(f"{key}.options.{option}: {model_type} has no such option{nearest(option, known)}")
    try:
        return type(config)(**{**fields, **options})
    except option_errors() as error:
        raise RecipeError(f"{key}: {model_type} does not accept these options ({one_line(error)})") from error


def _check_kind(key: str, config: SideConfig, settings: Any) -> None:
    place = f"{key}.type" if config.checkpoint is None else f"{key}.checkpoint"
    model_class = _model_class(settings)
    side, reads = ("pictures", "pixel_values") if _side(config) == "vision" else ("text", "input_ids")
    if model_class is None or model_class.main_input_name != reads or getattr(settings, "is_encoder_decoder", False):
        raise RecipeError(f"{place}: {settings.model_type} is not an encoder of {side}; use another")
    if not any(getattr(settings, name, None) for name in ("hidden_size", "hidden_sizes")):
        raise RecipeError(f"{place}: {settings.model_type} has neither hidden_size nor hidden_sizes; use another")


def _model_class(settings: Any) -> Any:
    import transformers

    classes = transformers.MODEL_MAPPING.get(type(settings), None)
    if classes is None:  # SigLIP's text tower is in no mapping of the Auto classes
        return getattr(transformers, type(settings).__name__.removesuffix("Config") + "Model", None)
    return classes[0] if isinstance(classes, (tuple, list)) else classes


def _fresh(key: str, config: SideConfig, settings: Any) -> Any:
    model_class = _model_class(settings)
    # Not built and then dropped: the random numbers of its weights would shift those of every part built later.
    optional = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    extra = {"add_pooling_layer": False} if optional and config.pooling != "pooler" else {}
    try:
        return model_class._from_config(settings, dtype=torch.float32, **extra)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise RecipeError(
            f"{key}: {settings.model_type} cannot be built with these options ({one_line(error)})"
        ) from error


def _drop_unread(backbone: Any, pooling: str) -> None:
    embeddings: Any = getattr(backbone, "embeddings", None)
    if getattr(embeddings, "mask_token", None) is not None:  # DINOv2's, for its own pretraining task
        embeddings.mask_token = None
    if pooling == "pooler":
        return
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        backbone.pooler = None
    if backbone.config.model_type == "siglip_vision_model" and backbone.use_head:
        backbone.use_head = False
        del backbone.head
    elif backbone.config.model_type == "siglip_text_model":
        backbone.head = nn.Identity()


def layers_of(backbone: Any) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of a backbone's layers (stages, if it is convolutional); None without such a list."""
    config = backbone.config
    num_layers = getattr(config, "num_hidden_layers", None) or len(getattr(config, "depths", ()))
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    return None


def depths(key: str, backbone: Any) -> tuple[dict[str, int], int]:
    """The depth of each parameter by name, and the largest depth: 0 for the embeddings, 1 … L for the layers, L + 1
    for what follows. Freezing and layer-wise learning rates use it.

    Raises RecipeError naming `key` if the backbone has no list of layers (ALBERT shares one layer).
    """
    if (named_layers := layers_of(backbone)) is None:
        raise RecipeError(f"{key}: {backbone.config.model_type} has no list of layers to count; leave it out")
    prefix, layers = f"{named_layers[0]}.", named_layers[1]
    # Registration follows the forward pass in every backbone of `transformers`: parameters named before the layers
    # feed them, those named after the layers read them.
    depth_of: dict[str, int] = {}
    deepest = 0
    for name, _ in backbone.named_parameters():
        if name.startswith(prefix):
            depth_of[name] = deepest = int(name.removeprefix(prefix).split(".")[0]) + 1
        else:
            depth_of[name] = deepest + 1 if deepest else 0
    return depth_of, len(layers) + 1


def freeze(key: str, backbone: Any, frozen: int | Literal["all"]) -> list[nn.Module]:
    """Stop training the embeddings and the first `frozen` layers, or all. Returns the modules that must stay in
    evaluation mode: updates of a frozen norm, or dropout in a frozen layer, would change the inputs of layers above.

    Raises RecipeError naming `key` if there are fewer layers.
    """
    if frozen == 0:
        return []
    if frozen == "all":
        backbone.requires_grad_(False)
        return [backbone]
    depth_of, deepest = depths(key, backbone)
    if frozen >= deepest:
        raise RecipeError(f"{key}: {frozen} of {deepest - 1} layers; give fewer, or all for the whole encoder")
    for name, parameter in backbone.named_parameters():
        if depth_of[name] <= frozen:
            parameter.requires_grad_(False)
    # Modules with only frozen parameters. A dropout has none; it follows the module that contains it.
    trained = {module: [weight.requires_grad for weight in module.parameters()] for module in backbone.modules()}
    return [module for module, weights in trained.items() if weights and not any(weights)]
