"""The model package: a plain directory that anyone can read and that contains no code.

`model.safetensors`, `config.json`, `tokenizer.json`, `preprocessor_config.json`, and `mmflow.json`, which is written
last and holds the sha256 of each file and the model's lineage. Imports torch only to load or write weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, RecipeError
from mmflow.core.storage import exists, join, positioned_reader, read_bytes, read_json, write_bytes, write_json
from mmflow.models.config import EncoderConfig, ModelConfig, TextEncoderConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from mmflow.models.model import Model

CARD = "mmflow.json"
WEIGHTS = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
CONFIG = "config.json"
MODEL_TYPE = "mmflow"  # the field with which transformers names an architecture
TOKENIZER = "tokenizer.json"
PREPROCESSOR = "preprocessor_config.json"
CLASSES = "heads.classes."  # the weights of the head that depends on the labels

# Fields of a configuration about a checkpoint (`_name_or_path` is a directory on the machine that had it) or its task,
# or derived from the recipe.
_NOT_OPTIONS = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version"}
_NOT_OPTIONS |= {"image_size", "model_type", "vocab_size"}


@dataclass(frozen=True)
class Package:
    """A committed package: its URI and its card."""

    uri: str
    card: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Hash of the files: the model's identity."""
        return str(self.card["digest"])

    @property
    def parameters(self) -> int:
        """The number of trained scalars."""
        return int(self.card["parameters"])


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, with its tokenizer and settings."""

    model: Model
    tokenizer: Tokenizer
    config: ModelConfig
    classes: tuple[str, ...] = ()  # labels or answers, in the order of the logits of the head `classes`


def write_package(
    uri: str,
    *,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_json: str,
    parameters: int,
    lineage: Mapping[str, Any],
    classes: Sequence[str] = (),
) -> Package:
    """Publish a package. The card is written last; a package without one does not exist. `config` is `portable`."""
    from safetensors.torch import save

    files = {
        WEIGHTS: save({name: tensor.contiguous() for name, tensor in state.items()}),
        CONFIG: _json({"model_type": MODEL_TYPE, **config.model_dump(mode="json"), "classes": list(classes)}),
        TOKENIZER: tokenizer_json.encode(),
        PREPROCESSOR: _json(preprocessor(config)),
    }
    for name, data in files.items():
        write_bytes(join(uri, name), data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    card = {
        "files": hashes,
        "digest": content_hash(hashes),
        "parameters": parameters,
        "bytes": sum(map(len, files.values())),
        "lineage": dict(lineage),
    }
    write_json(join(uri, CARD), card)
    return Package(uri, card)


def preprocessor(config: ModelConfig) -> dict[str, Any]:
    """The file from which `transformers` prepares pictures as evaluation does here."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.image_pixels},
        "do_center_crop": True,
        "crop_size": {"height": config.image_pixels, "width": config.image_pixels},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
        "resample": 2,
    }


def portable(config: ModelConfig, model: Model) -> ModelConfig:
    """The settings that build `model` on a machine without the checkpoints it started from, for its package."""
    towers = {side: without_checkpoint(encoder, getattr(model, side)) for side, encoder in config.encoders.items()}
    return config.model_copy(update=towers)


def without_checkpoint(config: EncoderConfig, tower: nn.Module) -> EncoderConfig:
    """The settings that build `tower` with fresh weights; stretched positions are included."""
    from transformers import CONFIG_MAPPING

    from mmflow.models.backbones import OWN_IDS

    if config.checkpoint is None:
        return config
    encoder: Any = getattr(tower, "encoder", tower)  # a clip's or a document's encoder contains one
    settings = encoder.backbone.config
    defaults = CONFIG_MAPPING[settings.model_type]().to_dict()
    # Ids of special tokens even if they are the type's defaults: fresh weights get those of mmflow's own tokenizer.
    options = {
        name: value
        for name, value in settings.to_dict().items()
        if name in defaults and name not in _NOT_OPTIONS and (value != defaults[name] or name in OWN_IDS)
    }
    update: dict[str, Any] = {"type": settings.model_type, "checkpoint": None, "options": options}
    if isinstance(config, TextEncoderConfig):
        update["positions"] = None
    return type(config).model_validate(config.model_dump() | update)


def read_package(uri: str) -> Package:
    """The package at `uri`, from its card alone. Raises MissingArtifactError if there is none, CorruptArtifactError if
    the digest does not match the listed files."""
    if not exists(join(uri, CARD)):
        raise MissingArtifactError(f"{uri}: no {CARD}, so no model package was committed here")
    card = read_json(join(uri, CARD))
    if not isinstance(card, dict) or card.get("digest") != content_hash(card.get("files")):
        raise CorruptArtifactError(f"{join(uri, CARD)}: changed since it was committed; restore or retrain the model")
    return Package(uri, card)


def load_package(package: Package) -> LoadedModel:
    """Read and check the files, and build the model in evaluation mode, fp32, on the CPU.

    Every file is checked against the card before it is parsed. Raises CorruptArtifactError naming the file.
    """
    from safetensors.torch import load

    from mmflow.loading.tokens import read_tokenizer
    from mmflow.models.model import build

    files = {name: _read_file(package, name) for name in package.card["files"]}
    config, classes = _parse(package)
    tokenizer = read_tokenizer(files[TOKENIZER].decode())
    model = build("model", config, tokenizer.get_vocab_size(), seed=0, num_classes=len(classes))
    try:
        model.load_state_dict(load(files[WEIGHTS]))
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CorruptArtifactError(
            f"{join(package.uri, WEIGHTS)}: {problem}; this version of mmflow cannot build it: retrain it"
        ) from error
    return LoadedModel(model.eval(), tokenizer, config, classes)


def weight_shapes(package: Package) -> dict[str, tuple[int, ...]]:
    """The shapes of the package's weights by name, from the header of their file, which is not checked against the
    card. Raises MissingArtifactError if there is no file, CorruptArtifactError if it has no such header."""
    uri = join(package.uri, WEIGHTS)
    read = positioned_reader(uri)
    try:
        header = json.loads(read(min(int.from_bytes(read(8, 0), "little"), MAX_HEADER_BYTES), 8))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptArtifactError(f"{uri}: not a safetensors file ({error}); write the package again") from error


def read_vocabulary(package: Package) -> tuple[str, tuple[str, ...]]:
    """The package's tokenizer.json as text, and its classes, without its weights. Raises as `load_package`."""
    return _read_file(package, TOKENIZER).decode(), _parse(package)[1]


def read_config(package: Package) -> ModelConfig:
    """The settings of the package's model, without its weights. Raises as `load_package`."""
    return _parse(package)[0]


def _parse(package: Package) -> tuple[ModelConfig, tuple[str, ...]]:
    fields = json.loads(_read_file(package, CONFIG))
    del fields["model_type"]
    classes = tuple(fields.pop("classes"))
    try:
        return ModelConfig.model_validate(fields), classes
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptArtifactError(
            f"{join(package.uri, CONFIG)}: {where}: {first['msg']}; this version of mmflow cannot build it: retrain it"
        ) from error


def _read_file(package: Package, name: str) -> bytes:
    data = read_bytes(join(package.uri, name))
    if hashlib.sha256(data).hexdigest() != package.card["files"][name]:
        raise CorruptArtifactError(f"{join(package.uri, name)}: changed since it was committed; restore or retrain it")
    return data


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


# --- starting a model from a package ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What a model and the package it starts from do not share, as modules or single tensors."""

    fresh: tuple[str, ...]  # in the model only: keeps its initial weights
    left_out: tuple[str, ...]  # in the package only


def start_from(key: str, model: Model, package: Package, classes: Sequence[str]) -> Start:
    """Load the package's weights into a model with these `classes`, in this order.

    The head `classes` keeps its initial weights if the package has other classes. `key` is the recipe's, for errors;
    raises as `check_start` and `load_package`.
    """
    from safetensors.torch import load

    weights, own = load(_read_file(package, WEIGHTS)), model.state_dict()
    _check_fit(key, own, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    left_out = () if read_vocabulary(package)[1] == tuple(classes) else CLASSES
    shared = {name: tensor for name, tensor in weights.items() if name in own and not name.startswith(left_out)}
    model.load_state_dict(shared, strict=False)
    return Start(_modules(own, shared), _modules(weights, shared))


def check_start(key: str, model: Model, package: Package) -> tuple[str, ...]:
    """The fresh parts of a model that starts from a package, without reading the package's weights.

    Raises RecipeError if a tensor has different shapes in the model and the package (except for the number of classes,
    which the data decides), or if an encoder shares no weight with the package's.
    """
    shapes, own = weight_shapes(package), model.state_dict()
    _check_fit(key, own, shapes)
    return _modules(own, shapes)


def fresh_parts(model: Model, config: ModelConfig) -> tuple[str, ...]:
    """The fresh parts of a model that does not start from a package: all but its encoders' checkpoints."""
    own = model.state_dict()
    trained = tuple(f"{side}." for side, encoder in config.encoders.items() if encoder.checkpoint is not None)
    return _modules(own, {name for name in own if name.startswith(trained) and "backbone." in name})


def _check_fit(key: str, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    section = key.rpartition(".")[0]
    for name, tensor in own.items():
        first = 1 if name.startswith(CLASSES) else 0
        if name in shapes and shapes[name][first:] != tensor.shape[first:]:
            raise RecipeError(
                f"{key}: {name} is {list(shapes[name])} in the package and {list(tensor.shape)} in {section}.model; "
                f"make them equal, or leave the difference out of {section}.model to use the package's settings"
            )
    for side in ("image", "text"):
        ours, theirs = ({name for name in names if name.startswith(f"{side}.")} for names in (own, shapes))
        if ours and theirs and ours.isdisjoint(theirs):
            raise RecipeError(
                f"{key}: the package's {side} encoder shares no weight with {section}.model's; give both the same "
                "type, or leave start out"
            )


def _modules(names: Collection[str], shared: Collection[str]) -> tuple[str, ...]:
    """The names that are not shared; a module's name in place of its tensors' where none of them is shared."""

    def modules_of(name: str) -> list[str]:  # outermost first, and the tensor itself
        parts = name.split(".")
        return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]

    holds_shared = {module for name in shared for module in modules_of(name)}
    unshared = (set(modules_of(name)) - holds_shared for name in names if name not in shared)
    return tuple(dict.fromkeys(min(modules, key=len) for modules in unshared))
