"""Backbones of `transformers`: from a type and its options, or from a local directory. Nothing is fetched, no code that
comes with a checkpoint is run, and no pickle is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from mmflow.core.errors import RecipeError
from mmflow.loading.tokens import LAST, PAD, SPECIAL
from mmflow.models.checkpoints import (
    DUAL,
    checkpoint_config,
    fit_pixels,
    fit_vocabulary,
    nearest,
    one_line,
    trained,
    wrong_options,
)
from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig

SideConfig = ImageEncoderConfig | TextEncoderConfig

# Of the tokenizer that mmflow trains; a fresh backbone that goes with another tokenizer is told its ids by options.
OWN_IDS = {"pad_token_id": SPECIAL.index(PAD), "eos_token_id": SPECIAL.index(LAST)}


def encoder_config(key: str, config: SideConfig, *, image_pixels: int = 0, vocabulary_size: int = 0) -> Any:
    """The `transformers` configuration of an encoder, checked, before any weight is made.

    `key` is the recipe's key, for errors. With a checkpoint that of its tower. Raises RecipeError for an unknown type,
    an option that the type lacks (`transformers` itself would take any word and use the default without a sound), or a
    directory that holds no configuration.
    """
    if config.checkpoint is not None:
        whole = checkpoint_config(key, config.checkpoint)
        found = getattr(whole, f"{_side(config)}_config") if whole.model_type in DUAL else whole
        return _with_options(key, found, found.to_dict(), config.options)
    found = _fresh_config(key, str(config.type))
    derived = {"image_size": image_pixels, "vocab_size": vocabulary_size, **OWN_IDS}
    known = found.to_dict()
    fresh = {name: value for name, value in derived.items() if name in known and (value or name in OWN_IDS)}
    return _with_options(key, found, fresh, config.options)


def load_backbone(key: str, config: SideConfig, *, image_pixels: int = 0, vocabulary_size: int = 0) -> Any:
    """A `PreTrainedModel` whose `last_hidden_state` is the encoder's sequence, in fp32: fresh, or a checkpoint's tower.

    What no `config.pooling` reads is left out: parameters without gradients weigh on every all-reduce and checkpoint.
    Raises RecipeError as `encoder_config` does, and for weights that are absent, do not fit or are a pickle, and for a
    vocabulary that is not the checkpoint's.
    """
    settings = encoder_config(key, config, image_pixels=image_pixels, vocabulary_size=vocabulary_size)
    _check_kind(key, config, settings)
    if config.checkpoint is None:
        backbone = _fresh(key, config, settings)
        _drop_unread(backbone, config.pooling)
        return backbone
    tower = f"{_side(config)}_model"
    backbone, missing = trained(key, config.checkpoint, settings, _model_class, tower)
    if image_pixels:  # before parts are dropped, which a refitted backbone has again
        backbone = fit_pixels(key, backbone, image_pixels)
    _drop_unread(backbone, config.pooling)
    absent = sorted(missing & set(backbone.state_dict()))
    if absent:
        raise RecipeError(
            f"{key}.checkpoint: {config.checkpoint} holds no {absent[0]}, nor {len(absent) - 1} others of "
            f"{settings.model_type}; save the whole model there"
        )
    if vocabulary_size:
        fit_vocabulary(key, config.checkpoint, backbone, vocabulary_size)
    return backbone


def _fresh_config(key: str, model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise RecipeError(f"{key}.type: transformers has no {model_type!r}{nearest(model_type, CONFIG_MAPPING.keys())}")
    return CONFIG_MAPPING[model_type]()


def _side(config: SideConfig) -> str:
    return "vision" if isinstance(config, ImageEncoderConfig) else "text"


def _with_options(key: str, config: Any, fields: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    model_type, known = config.model_type, config.to_dict()
    for option in options:
        if option not in known:
            raise RecipeError(f"{key}.options.{option}: {model_type} has no such option{nearest(option, known)}")
    try:
        return type(config)(**{**fields, **options})
    except wrong_options() as error:
        raise RecipeError(f"{key}: {model_type} does not take these options ({one_line(error)})") from error


def _check_kind(key: str, config: SideConfig, settings: Any) -> None:
    place = f"{key}.type" if config.checkpoint is None else f"{key}.checkpoint"
    model_class = _model_class(settings)
    side, reads = ("pictures", "pixel_values") if _side(config) == "vision" else ("text", "input_ids")
    if model_class is None or model_class.main_input_name != reads or getattr(settings, "is_encoder_decoder", False):
        raise RecipeError(f"{place}: {settings.model_type} is no encoder of {side}; use another")
    if not getattr(settings, "hidden_size", None) and not getattr(settings, "hidden_sizes", None):
        raise RecipeError(
            f"{place}: {settings.model_type} states neither hidden_size nor hidden_sizes; use another encoder"
        )


def _model_class(settings: Any) -> Any:
    import transformers

    found = transformers.MODEL_MAPPING.get(type(settings), None)
    if found is None:  # the text tower of SigLIP stands in no mapping of the Auto classes
        return getattr(transformers, type(settings).__name__.removesuffix("Config") + "Model", None)
    return found[0] if isinstance(found, (tuple, list)) else found


def _fresh(key: str, config: SideConfig, settings: Any) -> Any:
    model_class = _model_class(settings)
    # Not made only to be dropped: the numbers that its weights draw would move those of all that is made after it.
    optional = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    extra = {"add_pooling_layer": False} if optional and config.pooling != "pooler" else {}
    try:
        return model_class._from_config(settings, dtype=torch.float32, **extra)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        reason = one_line(error)
        raise RecipeError(f"{key}: {settings.model_type} cannot be built from these options ({reason})") from error


def _drop_unread(backbone: Any, pooling: str) -> None:
    embeddings: Any = getattr(backbone, "embeddings", None)
    if getattr(embeddings, "mask_token", None) is not None:  # DINOv2's, of a task that is not ours
        embeddings.mask_token = None
    if pooling == "pooler":
        return
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, torch.nn.Module) and any(True for _ in pooler.parameters()):
        backbone.pooler = None
    if backbone.config.model_type == "siglip_vision_model" and backbone.use_head:
        backbone.use_head = False
        del backbone.head
    elif backbone.config.model_type == "siglip_text_model":
        backbone.head = torch.nn.Identity()
