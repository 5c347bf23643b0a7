"""Checkpoints of `transformers` in local directories: their settings and weights, and how these are made to fit longer
text, other picture sizes and smaller vocabularies."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.config import IN_PACKAGE

# Shapes: P positions, W width, h and w rows and columns of patches.

# Layouts with two towers, `vision_model` and `text_model`.
DUAL = ("clip", "siglip", "vision-text-dual-encoder")
# Word embeddings of checkpoints are padded to a multiple of a power of two. T5 and ModernBERT, the most padded ones in
# wide use, have under 1% spare rows; more than this share means that the tokenizer is another one.
MAX_SPARE_VOCABULARY = 0.1


def checkpoint_directory(key: str, checkpoint: str) -> Path:
    """A checkpoint's directory; `package:NAME/PATH` is PATH in the installed Python package NAME, without importing it.

    Raises RecipeError naming `key` if the package is not installed or the directory does not exist.
    """
    if not checkpoint.startswith(IN_PACKAGE):
        directory = Path(checkpoint)
    else:
        name, _, path = checkpoint.removeprefix(IN_PACKAGE).partition("/")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(f"{key}: {checkpoint} names a package that is not installed here; install {name!r}")
        directory = Path(spec.submodule_search_locations[0]) / path
    if not directory.is_dir():
        raise RecipeError(f"{key}: {checkpoint} is not a directory on this machine; name one from save_pretrained")
    return directory


def checkpoint_config(key: str, checkpoint: str) -> Any:
    """The `transformers` configuration of the whole checkpoint. Raises RecipeError naming `key` if there is none.

    Built from the JSON and never by `AutoConfig.from_pretrained`, which would look for code and adapters.
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
        raise RecipeError(f"{place}/config.json has no model_type ({one_line(error)}); save it again") from error
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"{place}: transformers has no {model_type!r}{nearest(model_type, CONFIG_MAPPING.keys())}; code that comes "
            "with a checkpoint is not run"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except option_errors() as error:
        raise RecipeError(f"{place}/config.json is not valid for {model_type} ({one_line(error)})") from error


def load_weights(
    key: str, checkpoint: str, settings: Any, model_class: Callable[[Any], Any], tower: str
) -> tuple[Any, set[str]]:
    """The backbone of `settings` with the checkpoint's weights in fp32, and the names of weights that it lacks.

    `model_class` gives a configuration's class; `tower` is the attribute to take from a layout with two. Raises
    RecipeError naming `key` if there are no safetensors or they do not load.
    """
    from safetensors import SafetensorError

    directory = checkpoint_directory(f"{key}.checkpoint", checkpoint)
    place = f"{key}.checkpoint: {checkpoint}"
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise RecipeError(f"{place} only has {pickles[0]}, a pickle, which can run code; save it as safetensors")
        raise RecipeError(f"{place} has no model.safetensors; save the model's weights there")
    whole = checkpoint_config(key, checkpoint)
    is_dual = whole.model_type in DUAL
    if is_dual:
        setattr(whole, tower.replace("model", "config"), settings)
    loaded = whole if is_dual else settings
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        with _quiet():
            model, info = model_class(loaded).from_pretrained(directory, config=loaded, dtype=torch.float32, **options)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise RecipeError(
            f"{place} does not load ({one_line(error)}); save it again, or correct the options"
        ) from error
    prefix = f"{tower}." if is_dual else ""
    missing = {name.removeprefix(prefix) for name in info["missing_keys"] if name.startswith(prefix)}
    return (getattr(model, tower) if is_dual else model), missing


@contextmanager
def _quiet() -> Iterator[None]:
    # Loading prints a progress bar and a table of unused weights; both are noise here.
    from transformers.utils import logging as untyped

    logging: Any = untyped
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
    """Drop the rows that no token id reaches. Raises RecipeError for a tokenizer that is not the checkpoint's."""
    words = backbone.get_input_embeddings()
    num_rows = words.num_embeddings
    if not num_rows * (1 - MAX_SPARE_VOCABULARY) <= vocabulary_size <= num_rows:
        raise RecipeError(
            f"{key}.checkpoint: {checkpoint} has a vocabulary of {num_rows}, the tokenizer {vocabulary_size}; "
            "use the tokenizer that is in the checkpoint"
        )
    trimmed = nn.Embedding(vocabulary_size, words.embedding_dim, words.padding_idx)
    trimmed.weight.data.copy_(words.weight.data[:vocabulary_size])
    backbone.set_input_embeddings(trimmed)
    backbone.config.vocab_size = vocabulary_size


def fit_pixels(key: str, backbone: Any, image_pixels: int) -> Any:
    """The backbone for pictures of `image_pixels`: the same weights, with positions resampled if the size differs."""
    settings = backbone.config
    old_pixels = getattr(settings, "image_size", image_pixels)
    if old_pixels == image_pixels:
        return backbone
    old = backbone.state_dict()
    refitted = type(backbone)(type(settings)(**settings.to_dict() | {"image_size": image_pixels}))
    for name, value in refitted.state_dict().items():
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


def resampled(positions_PW: Tensor, old_side: int, new_side: int) -> Tensor:
    """Positions of a grid of `old_side`² patches for one of `new_side`², bicubic as in ViT (arXiv 2010.11929, section
    3.2) and DINOv2. Positions before the grid (the class token's) stay."""
    prefix = len(positions_PW) - old_side**2
    grid_1Whw = positions_PW[prefix:].T.reshape(1, -1, old_side, old_side)
    grid_1Whw = nn.functional.interpolate(grid_1Whw, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return torch.cat([positions_PW[:prefix], grid_1Whw.flatten(2)[0].T])


def stretched(positions_PW: Tensor, keep: int, factor: int) -> Tensor:
    """Long-CLIP's positions (arXiv 2403.15378, section 3.1 and equation 2): (keep + (P - keep) · factor, W).

    The first `keep` stay; after them each interval is divided linearly into `factor`, and the last one is continued.
    """
    count = len(positions_PW)
    place_P = keep + torch.arange((count - keep) * factor, device=positions_PW.device) / factor
    # The last positions have no right neighbour: they continue the line through the two before them.
    left_P = place_P.long().clamp(max=count - 2)
    share_P1 = (place_P - left_P).unsqueeze(1).to(positions_PW.dtype)
    between_PW = torch.lerp(positions_PW[left_P], positions_PW[left_P + 1], share_P1)
    return torch.cat([positions_PW[:keep], between_PW])


def stretch_text(key: str, backbone: Any, keep: int, factor: int) -> None:
    """Stretch a text backbone's learned positions in place. Raises RecipeError naming `key` if it has none."""
    table = _text_positions(backbone)
    model_type = backbone.config.model_type
    if table is None:
        raise RecipeError(
            f"{key}: {model_type} has no learned absolute positions; leave it out, and raise max_tokens up to its "
            "max_position_embeddings"
        )
    name, offset = table
    embeddings = backbone.embeddings
    rows_PW = getattr(embeddings, name).weight.detach()
    if keep > len(rows_PW) - offset - 2:
        raise RecipeError(
            f"{key}.keep: {keep} of {len(rows_PW) - offset} positions leaves fewer than two to interpolate between; "
            "give a smaller number"
        )
    longer_PW = torch.cat([rows_PW[:offset], stretched(rows_PW[offset:], keep, factor)])
    longer = nn.Embedding(len(longer_PW), longer_PW.shape[1], getattr(embeddings, name).padding_idx)
    longer.weight.data.copy_(longer_PW)
    setattr(embeddings, name, longer)
    ids_1P = torch.arange(len(longer_PW))[None]
    for buffer, values_1P in (("position_ids", ids_1P), ("token_type_ids", torch.zeros_like(ids_1P))):
        if hasattr(embeddings, buffer):
            embeddings.register_buffer(buffer, values_1P, persistent=False)
    backbone.config.max_position_embeddings = len(longer_PW)


def num_positions(backbone: Any) -> int | None:
    """How many tokens a text backbone can read: its learned positions without those for padding (RoBERTa's count from
    pad + 1), or what its configuration states; None if nothing limits it."""
    table = _text_positions(backbone)
    if table is None:
        return getattr(backbone.config, "max_position_embeddings", None)
    name, offset = table
    return int(getattr(backbone.embeddings, name).num_embeddings) - offset


def _text_positions(backbone: Any) -> tuple[str, int] | None:
    # The table's name in `embeddings`, and how many of its first rows no token uses.
    for name in ("position_embeddings", "position_embedding"):
        table = getattr(getattr(backbone, "embeddings", None), name, None)
        if isinstance(table, nn.Embedding):
            return name, 0 if table.padding_idx is None else table.padding_idx + 1
    return None


def option_errors() -> tuple[type[Exception], ...]:
    """What a configuration raises for invalid values."""
    from huggingface_hub.errors import StrictDataclassError

    return ValueError, TypeError, StrictDataclassError


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the nearest known word, or an empty string."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
