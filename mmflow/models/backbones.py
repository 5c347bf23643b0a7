"""Backbones of `transformers`: from a type and its options, or from a local directory. Nothing is fetched, no code that
comes with a checkpoint is run, and no pickle is read."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmflow.errors import RecipeError
from mmflow.loading.tokens import LAST, PAD, SPECIAL
from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig
from mmflow.models.positions import resampled

SideConfig = ImageEncoderConfig | TextEncoderConfig

# Of the tokenizer that mmflow trains; a fresh backbone that goes with another tokenizer is told its ids by options.
OWN_IDS = {"pad_token_id": SPECIAL.index(PAD), "eos_token_id": SPECIAL.index(LAST)}
# Rows of a checkpoint's word embeddings are padded to a multiple of a power of two; more than this are another
# tokenizer's: the most padded that is in wide use, T5's and ModernBERT's, have under 1% too many.
MAX_SPARE_VOCABULARY = 0.1


def encoder_config(key: str, config: SideConfig, *, image_pixels: int = 0, vocabulary_size: int = 0) -> Any:
    """The `transformers` configuration of an encoder, checked, before any weight is made.

    `key` is the recipe's key, for errors. With a checkpoint that of its tower. Raises RecipeError for an unknown type,
    an option that the type lacks (`transformers` itself would take any word and use the default without a sound), or a
    directory that holds no configuration.
    """
    whole = _whole_config(key, config)
    found = _tower_config(whole, config)
    if config.type is None:
        return _with_options(key, found, found.to_dict(), config.options)
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
    backbone, missing = _trained(key, config, settings)
    _drop_unread(backbone, config.pooling)
    absent = sorted(missing & set(backbone.state_dict()))
    if absent:
        raise RecipeError(
            f"{key}.checkpoint: {config.checkpoint} holds no {absent[0]}, nor {len(absent) - 1} others of "
            f"{settings.model_type}; save the whole model there"
        )
    if vocabulary_size:
        _fit_vocabulary(key, config, backbone, vocabulary_size)
    if image_pixels:
        backbone = _fit_pixels(key, backbone, image_pixels)
    return backbone


def _whole_config(key: str, config: SideConfig) -> Any:
    # From the dictionary and never by `AutoConfig.from_pretrained`, which would look for code and adapters.
    from transformers import CONFIG_MAPPING

    known_types = CONFIG_MAPPING.keys()
    if config.checkpoint is None:
        model_type = str(config.type)
        if model_type not in known_types:
            raise RecipeError(f"{key}.type: transformers has no {model_type!r}{_nearest(model_type, known_types)}")
        return CONFIG_MAPPING[model_type]()
    place = f"{key}.checkpoint: {config.checkpoint}"
    path = Path(config.checkpoint) / "config.json"
    if not path.is_file():
        raise RecipeError(f"{place} has no config.json; give a directory of this machine as save_pretrained writes it")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{place}/config.json names no model_type ({_one_line(error)}); save it again") from error
    if model_type not in known_types:
        raise RecipeError(
            f"{place} is a {model_type!r}, which transformers itself does not know{_nearest(model_type, known_types)}; "
            "code that comes with a checkpoint is not run"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except _wrong_options() as error:
        raise RecipeError(f"{place}/config.json is not one of {model_type} ({_one_line(error)})") from error


def _side(config: SideConfig) -> str:
    return "vision" if isinstance(config, ImageEncoderConfig) else "text"


def _tower_config(whole: Any, config: SideConfig) -> Any:
    # CLIP, SigLIP and VisionTextDualEncoder hold one of each; a type must name its tower, for there the options are.
    if config.checkpoint is not None and {"vision_config", "text_config"} <= whole.sub_configs.keys():
        return getattr(whole, f"{_side(config)}_config")
    if config.checkpoint is not None and whole.model_type == "vision-text-dual-encoder":
        return getattr(whole, f"{_side(config)}_config")
    return whole


def _with_options(key: str, config: Any, fields: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    model_type, known = config.model_type, config.to_dict()
    for option in options:
        if option not in known:
            raise RecipeError(f"{key}.options.{option}: {model_type} has no such option{_nearest(option, known)}")
    try:
        return type(config)(**{**fields, **options})
    except _wrong_options() as error:
        raise RecipeError(f"{key}: {model_type} does not take these options ({_one_line(error)})") from error


def _wrong_options() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError

    return ValueError, TypeError, StrictDataclassError


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
        reason = _one_line(error)
        raise RecipeError(f"{key}: {settings.model_type} cannot be built from these options ({reason})") from error


def _trained(key: str, config: SideConfig, settings: Any) -> tuple[Any, set[str]]:
    # The tower, and the names of its weights that the checkpoint lacks.
    from safetensors import SafetensorError

    directory = Path(str(config.checkpoint))
    place = f"{key}.checkpoint: {directory}"
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise RecipeError(f"{place} holds {pickles[0]} alone, a pickle, which can run code; save it as safetensors")
        raise RecipeError(f"{place} has no model.safetensors; save the model's weights there")
    whole = _whole_config(key, config)
    tower = "" if whole.model_type == settings.model_type else f"{_side(config)}_model"
    if tower:
        setattr(whole, f"{_side(config)}_config", settings)
    try:
        with _quiet():
            model, info = _model_class(whole if tower else settings).from_pretrained(
                directory,
                config=whole if tower else settings,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise RecipeError(f"{place} does not load ({_one_line(error)}); save it again, or mend the options") from error
    prefix = f"{tower}." if tower else ""
    missing = {name.removeprefix(prefix) for name in info["missing_keys"] if name.startswith(prefix)}
    return (getattr(model, tower) if tower else model), missing


@contextmanager
def _quiet() -> Iterator[None]:
    # Loading prints a bar and a table of what a task's head left behind: neither is news here.
    from transformers.utils import logging as whole_module

    logging: Any = whole_module  # its functions state no types
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


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


def _fit_vocabulary(key: str, config: SideConfig, backbone: Any, vocabulary_size: int) -> None:
    words = backbone.get_input_embeddings()
    rows = words.num_embeddings
    if not rows * (1 - MAX_SPARE_VOCABULARY) <= vocabulary_size <= rows:
        raise RecipeError(
            f"{key}.checkpoint: {config.checkpoint} has a vocabulary of {rows}, the tokenizer {vocabulary_size}; "
            "use the tokenizer that is in the checkpoint"
        )
    # No id reaches the rows past the vocabulary.
    trimmed = torch.nn.Embedding(vocabulary_size, words.embedding_dim, words.padding_idx)
    trimmed.weight.data.copy_(words.weight.data[:vocabulary_size])
    backbone.set_input_embeddings(trimmed)
    backbone.config.vocab_size = vocabulary_size


def _fit_pixels(key: str, backbone: Any, image_pixels: int) -> Any:
    # Where the checkpoint saw pictures of another size: the same weights, their positions resampled once.
    settings = backbone.config
    old_pixels = getattr(settings, "image_size", image_pixels)
    if old_pixels == image_pixels:
        return backbone
    old = backbone.state_dict()
    fields = settings.to_dict() | {"image_size": image_pixels}
    refitted = type(backbone)(type(settings)(**fields))
    state = refitted.state_dict()
    for name, value in state.items():
        if value.shape != old[name].shape:
            if "position_embedding" not in name or not isinstance(old_pixels, int):
                raise RecipeError(
                    f"{key}.checkpoint: {settings.model_type} was trained on pictures of {old_pixels} pixels and its "
                    f"{name} does not fit {image_pixels}; set image_pixels: {old_pixels}"
                )
            rows_PW = old[name].reshape(-1, value.shape[-1])
            patch = settings.patch_size
            old[name] = resampled(rows_PW, old_pixels // patch, image_pixels // patch).reshape(value.shape)
    refitted.load_state_dict(old)
    return refitted


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
