"""The model package: a plain directory that anyone can read and nothing in it can run code.

`model.safetensors`, `config.json`, `tokenizer.json`, `preprocessor_config.json`, and `mmflow.json`, published last,
with the sha256 of each file and where the model came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.core.storage import exists, join, positioned_reader, read_bytes, read_json, write_bytes, write_json
from mmflow.models.config import EncoderConfig, ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from mmflow.models.model import Model

CARD = "mmflow.json"
WEIGHTS = "model.safetensors"
MAX_HEAD_BYTES = 100_000_000  # as safetensors itself bounds it
CONFIG = "config.json"
MODEL_TYPE = "mmflow"  # in it, where transformers has the name of an architecture
TOKENIZER = "tokenizer.json"
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Package:
    """A committed package: where it lies, and its card."""

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
    """A model ready for use: its weights, its tokenizer, how its pictures are prepared, and what its classes are."""

    model: Model
    tokenizer: Tokenizer
    config: ModelConfig
    classes: tuple[str, ...] = ()  # labels or answers, in the order of the logits of the head `classes`


def portable(config: ModelConfig, model: Model) -> ModelConfig:
    """The settings of `model` that build it where no checkpoint is that it began from: what a package states."""
    from mmflow.models.towers import without_checkpoint

    towers: dict[str, EncoderConfig] = {"image": without_checkpoint(config.image, model.image)}
    if config.text is not None and model.text is not None:
        towers["text"] = without_checkpoint(config.text, model.text)
    return config.model_copy(update=towers)


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
    """Publish a package. The card goes last, so that a package without one does not exist. `config` is `portable`."""
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
    """The file by which `transformers` prepares pictures as evaluation does here."""
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


def read_package(uri: str) -> Package:
    """The package at `uri`, by its card alone. Raises MissingArtifactError where there is none, CorruptArtifactError
    where the digest is not that of the files it lists."""
    if not exists(join(uri, CARD)):
        raise MissingArtifactError(f"{uri}: no {CARD}, so no model package was committed here")
    card = read_json(join(uri, CARD))
    if not isinstance(card, dict) or card.get("digest") != content_hash(card.get("files")):
        raise CorruptArtifactError(f"{join(uri, CARD)}: altered since it was committed; restore or retrain the model")
    return Package(uri, card)


def load_package(package: Package) -> LoadedModel:
    """Read, check and build the model, in evaluation mode, fp32, on the CPU.

    Every file is checked against the card before anything is made of it. Raises CorruptArtifactError naming the file.
    """
    from safetensors.torch import load

    from mmflow.loading.tokens import read_tokenizer
    from mmflow.models.model import build

    files = {name: _read_file(package, name) for name in package.card["files"]}
    config, classes = _parse(package)
    tokenizer = read_tokenizer(files[TOKENIZER].decode())
    model = build("model", config, tokenizer.get_vocab_size(), seed=0, num_classes=len(classes))
    model.load_state_dict(load(files[WEIGHTS]))
    return LoadedModel(model.eval(), tokenizer, config, classes)


def read_weights(package: Package) -> dict[str, Tensor]:
    """The package's weights by name, without a model of them. Raises as `load_package`."""
    from safetensors.torch import load

    return load(_read_file(package, WEIGHTS))


def weight_shapes(package: Package) -> dict[str, tuple[int, ...]]:
    """The shapes of the package's weights by name, from the head of their file alone, which is not compared with the
    card. Raises MissingArtifactError where the file is gone, CorruptArtifactError where it has no such head."""
    uri = join(package.uri, WEIGHTS)
    read = positioned_reader(uri)
    try:
        header = json.loads(read(min(int.from_bytes(read(8, 0), "little"), MAX_HEAD_BYTES), 8))
        return {name: tuple(each["shape"]) for name, each in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptArtifactError(f"{uri}: no weights ({error}); write the package again") from error


def read_vocabulary(package: Package) -> tuple[str, tuple[str, ...]]:
    """The package's tokenizer.json as text, and its classes; the weights are not read. Raises as `load_package`."""
    _, classes = _parse(package)
    return _read_file(package, TOKENIZER).decode(), classes


def read_config(package: Package) -> ModelConfig:
    """What the package's model is made of; the weights are not read. Raises as `load_package`."""
    config, _ = _parse(package)
    return config


def _parse(package: Package) -> tuple[ModelConfig, tuple[str, ...]]:
    fields = json.loads(_read_file(package, CONFIG))
    fields.pop("model_type")
    classes = tuple(fields.pop("classes", ()))
    video = fields.get("video")
    if video is not None and video["kind"] == "mean":  # older packages name layers that a mean never had
        video |= {"layers": None, "heads": None}
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
        raise CorruptArtifactError(f"{join(package.uri, name)}: altered since it was committed; restore or retrain it")
    return data


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
