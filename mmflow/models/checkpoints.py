"""Checkpoints of `transformers` in local directories: their settings, their weights, and how they are made to fit."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmflow.core.errors import RecipeError
from mmflow.models.config import IN_PACKAGE
from mmflow.models.positions import resampled

# Layouts of two towers, `vision_model` and `text_model`, that a checkpoint may have.
DUAL = frozenset(("clip", "siglip", "vision-text-dual-encoder"))
# Rows of a checkpoint's word embeddings are padded to a multiple of a power of two; more than this are another
# tokenizer's: the most padded that is in wide use, T5's and ModernBERT's, have under 1% too many.
MAX_SPARE_VOCABULARY = 0.1


def checkpoint_directory(key: str, checkpoint: str) -> Path:
    """Where a checkpoint lies: a directory, or `package:NAME/PATH`, which is PATH in the installed Python package NAME.

    The package is not imported. Raises RecipeError naming `key` where it is not installed or the directory not there.
    """
    if not checkpoint.startswith(IN_PACKAGE):
        directory = Path(checkpoint)
    else:
        name, _, path = checkpoint.removeprefix(IN_PACKAGE).partition("/")
        found = importlib.util.find_spec(name) if name.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise RecipeError(f"{key}: {checkpoint} names a package that is not installed here; install {name!r}")
        directory = Path(found.submodule_search_locations[0]) / path
    if not directory.is_dir():
        raise RecipeError(f"{key}: {checkpoint} is no directory of this machine; give one that save_pretrained wrote")
    return directory


def checkpoint_config(key: str, checkpoint: str) -> Any:
    """The `transformers` configuration of the whole checkpoint. Raises RecipeError naming `key` where there is none.

    From the dictionary and never by `AutoConfig.from_pretrained`, which would look for code and adapters.
    """
    from transformers import CONFIG_MAPPING

    place = f"{key}.checkpoint: {checkpoint}"
    path = checkpoint_directory(f"{key}.checkpoint", checkpoint) / "config.json"
    if not path.is_file():
        raise RecipeError(f"{place} has no config.json; give a directory that save_pretrained wrote")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{place}/config.json names no model_type ({one_line(error)}); save it again") from error
    if model_type not in CONFIG_MAPPING:
        like = nearest(model_type, CONFIG_MAPPING.keys())
        raise RecipeError(
            f"{place} is a {model_type!r}, which transformers itself does not know{like}; code that comes with a "
            "checkpoint is not run"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except wrong_options() as error:
        raise RecipeError(f"{place}/config.json is not one of {model_type} ({one_line(error)})") from error


def trained(
    key: str, checkpoint: str, settings: Any, model_class: Callable[[Any], Any], tower: str
) -> tuple[Any, set[str]]:
    """The backbone of `settings` with the checkpoint's weights in fp32, and the names of those that it lacks.

    `model_class` gives a configuration's class; `tower` is the attribute to take of a layout of two. Raises RecipeError
    naming `key` where there are no safetensors or they do not load.
    """
    from safetensors import SafetensorError

    directory = checkpoint_directory(f"{key}.checkpoint", checkpoint)
    place = f"{key}.checkpoint: {checkpoint}"
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise RecipeError(f"{place} holds {pickles[0]} alone, a pickle, which can run code; save it as safetensors")
        raise RecipeError(f"{place} has no model.safetensors; save the model's weights there")
    whole = checkpoint_config(key, checkpoint)
    is_dual = whole.model_type in DUAL
    if is_dual:
        setattr(whole, tower.replace("model", "config"), settings)
    loaded = whole if is_dual else settings
    try:
        with _quiet():
            model, info = model_class(loaded).from_pretrained(
                directory,
                config=loaded,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise RecipeError(f"{place} does not load ({one_line(error)}); save it again, or mend the options") from error
    prefix = f"{tower}." if is_dual else ""
    missing = {name.removeprefix(prefix) for name in info["missing_keys"] if name.startswith(prefix)}
    return (getattr(model, tower) if is_dual else model), missing


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


def fit_vocabulary(key: str, checkpoint: str, backbone: Any, vocabulary_size: int) -> None:
    """Drop the rows that no id of a vocabulary of `vocabulary_size` reaches. Raises RecipeError for another's."""
    words = backbone.get_input_embeddings()
    rows = words.num_embeddings
    if not rows * (1 - MAX_SPARE_VOCABULARY) <= vocabulary_size <= rows:
        raise RecipeError(
            f"{key}.checkpoint: {checkpoint} has a vocabulary of {rows}, the tokenizer {vocabulary_size}; "
            "use the tokenizer that is in the checkpoint"
        )
    trimmed = torch.nn.Embedding(vocabulary_size, words.embedding_dim, words.padding_idx)
    trimmed.weight.data.copy_(words.weight.data[:vocabulary_size])
    backbone.set_input_embeddings(trimmed)
    backbone.config.vocab_size = vocabulary_size


def fit_pixels(key: str, backbone: Any, image_pixels: int) -> Any:
    """The backbone for pictures of `image_pixels`: where it saw others, the same weights with positions resampled."""
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


def wrong_options() -> tuple[type[Exception], ...]:
    """What a configuration raises for values that it does not take."""
    from huggingface_hub.errors import StrictDataclassError

    return ValueError, TypeError, StrictDataclassError


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the known word nearest to this one, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
