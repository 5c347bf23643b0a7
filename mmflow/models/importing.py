"""Import a dual encoder that `transformers` saved as a model package with the same logits, without running its code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmflow.core.errors import MisuseError
from mmflow.core.storage import exists, file_sha256, join, local_path, read_json
from mmflow.loading.tokens import load_tokenizer
from mmflow.models.backbones import encoder_config
from mmflow.models.config import ImageEncoderConfig, ModelConfig, TextEncoderConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.model import Model, build
from mmflow.models.package import CARD, CONFIG, MODEL_TYPE, PREPROCESSOR, Package, portable, write_package
from mmflow.models.pretrained import DUAL, one_line

SHARED = ("visual_projection.weight", "text_projection.weight", "logit_scale", "logit_bias")
# Their positions start after that of padding.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert")


def import_checkpoint(uri: str, directory: str | Path) -> Package:
    """Publish a package made from a CLIP, SigLIP or VisionTextDualEncoder directory that `save_pretrained` wrote:
    config.json, safetensors, tokenizer.json and the image processor's file.

    Raises MisuseError for another layout, for a missing file, and if the target holds a package or another model;
    RecipeError for weights that do not fit.
    """
    directory = Path(directory)
    _check_target(uri, directory)
    layout = _read_json(directory / "config.json").get("model_type")
    if layout not in DUAL:
        raise MisuseError(f"{directory}: config.json says {layout!r}; what can be imported is {', '.join(DUAL)}")
    tokenizer = load_tokenizer(directory, f"{directory}")
    shared = _shared_weights(directory)
    image = ImageEncoderConfig(checkpoint=str(directory), pooling="pooler")
    text = TextEncoderConfig(checkpoint=str(directory), pooling="pooler")
    text_settings = encoder_config("model.text", text)
    offset = text_settings.pad_token_id + 1 if text_settings.model_type in OFFSET_POSITIONS else 0
    # SigLIP has no projections: its towers end in the shared space.
    projection = shared.get("visual_projection.weight")
    bias = shared.get("logit_bias")
    config = ModelConfig(
        image=image,
        text=text,
        embedding_width=text_settings.hidden_size if projection is None else len(projection),
        max_tokens=text_settings.max_position_embeddings - offset,
        temperature=math.exp(-shared["logit_scale"].item()),
        bias=None if bias is None else bias.item(),
        **_picture_settings(directory, encoder_config("model.image", image)),
    )
    model = build("model", config, tokenizer.get_vocab_size(), seed=0)
    _fill(model, shared)
    return write_package(
        uri,
        state=model.state_dict(),
        config=portable(config, model),
        tokenizer_json=tokenizer.to_str(),
        parameters=parameter_count(model),
        lineage={
            "imported": layout,
            "weights": {path.name: file_sha256(str(path)) for path in sorted(directory.glob("*.safetensors"))},
        },
    )


@torch.no_grad()
def _fill(model: Model, shared: Mapping[str, Tensor]) -> None:
    assert model.scale is not None
    for projection, name in zip((model.image_projection, model.text_projection), SHARED[:2], strict=True):
        assert projection is not None
        projection.weight.copy_(shared.get(name, torch.eye(*projection.weight.shape)))
    # Shape () in CLIP and VisionTextDualEncoder, (1,) in SigLIP and here.
    model.scale.logit_scale.copy_(shared["logit_scale"].reshape(1))
    if model.scale.logit_bias is not None:
        model.scale.logit_bias.copy_(shared["logit_bias"].reshape(1))


def _check_target(uri: str, directory: Path) -> None:
    """Raise MisuseError if the package would overwrite the checkpoint itself, a package or another model."""
    target = local_path(uri)
    if target is not None and target.resolve() == directory.resolve():
        raise MisuseError(f"{uri}: this is the checkpoint; name another directory for the package")
    # An import that was killed leaves a package without its card, which this one replaces.
    is_other = exists(join(uri, CONFIG)) and read_json(join(uri, CONFIG)).get("model_type") != MODEL_TYPE
    if is_other or exists(join(uri, CARD)):
        raise MisuseError(f"{uri}: already holds a model; name another directory")


def _shared_weights(directory: Path) -> dict[str, Tensor]:
    """The weights outside the towers, from all files, fp32."""
    from safetensors import safe_open

    shared: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            shared |= {name: weights.get_tensor(name).float() for name in SHARED if name in weights.keys()}  # noqa: SIM118
    if "logit_scale" not in shared:
        raise MisuseError(f"{directory}: no logit_scale in its *.safetensors; save the whole model there, not a tower")
    return shared


def _picture_settings(directory: Path, vision: Any) -> dict[str, Any]:
    """Side, mean and deviation of the pictures, from the vision tower and its image processor."""
    path = directory / PREPROCESSOR
    if not path.is_file():
        path = directory / "processor_config.json"  # where a processor of transformers 5 writes it
    processor = _read_json(path)
    processor = processor.get("image_processor", processor)
    side = getattr(vision, "image_size", None)
    if not isinstance(side, int):
        size = processor.get("crop_size") or processor.get("size") or {}
        side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    missing = [key for key in ("image_mean", "image_std") if key not in processor]
    if missing or not isinstance(side, int):
        raise MisuseError(f"{path}: no {(missing or ['size'])[0]}; save the model's image processor there")
    return {
        "image_pixels": side,
        "pixel_mean": tuple(processor["image_mean"]),
        "pixel_std": tuple(processor["image_std"]),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MisuseError(
            f"{path}: cannot be read ({one_line(error)}); give a directory that save_pretrained wrote"
        ) from error
    if not isinstance(fields, dict):
        raise MisuseError(f"{path}: a {type(fields).__name__} instead of settings; save the model again")
    return fields
