"""A dual encoder that `transformers` saved, as a model package: the same logits, without the code that made it."""

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
from mmflow.models.package import CARD, CONFIG, MODEL_TYPE, Package, portable, write_package

LAYOUTS = ("clip", "siglip", "vision-text-dual-encoder")
SHARED = ("visual_projection.weight", "text_projection.weight", "logit_scale", "logit_bias")
# Their positions begin after that of padding.
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert"})


def import_checkpoint(uri: str, directory: str | Path) -> Package:
    """Publish a package made of a CLIP, SigLIP or VisionTextDualEncoder directory (`save_pretrained`'s: config.json,
    safetensors, tokenizer.json and the image processor's file).

    Raises MisuseError for another layout, a file that is not there, and where a package or a model of others is
    already; RecipeError for weights that do not fit.
    """
    directory = Path(directory)
    _refuse_what_is_there(uri, directory)
    layout = _json(directory, "config.json").get("model_type")
    if layout not in LAYOUTS:
        raise MisuseError(f"{directory}: its config.json says {layout!r}; what can be imported is {', '.join(LAYOUTS)}")
    tokenizer = load_tokenizer(directory, f"{directory}")
    shared = _shared(directory)
    image = ImageEncoderConfig(checkpoint=str(directory), pooling="pooler")
    text = TextEncoderConfig(checkpoint=str(directory), pooling="pooler")
    reads = encoder_config("model.text", text)
    offset = reads.pad_token_id + 1 if reads.model_type in OFFSET_POSITIONS else 0
    # SigLIP has no projections: its towers end in the space that they share.
    width = len(shared["visual_projection.weight"]) if "visual_projection.weight" in shared else reads.hidden_size
    bias = shared.get("logit_bias")
    config = ModelConfig(
        image=image,
        text=text,
        embedding_width=width,
        max_tokens=reads.max_position_embeddings - offset,
        temperature=math.exp(-shared["logit_scale"].item()),
        bias=None if bias is None else bias.item(),
        **_pictures(directory, encoder_config("model.image", image)),
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
    assert model.image_projection is not None
    assert model.text_projection is not None
    assert model.scale is not None
    for projection, name in ((model.image_projection, SHARED[0]), (model.text_projection, SHARED[1])):
        projection.weight.copy_(shared.get(name, torch.eye(*projection.weight.shape)))
    # Of shape () in CLIP and VisionTextDualEncoder, (1,) in SigLIP and here.
    model.scale.logit_scale.copy_(shared["logit_scale"].reshape(1))
    if model.scale.logit_bias is not None:
        model.scale.logit_bias.copy_(shared["logit_bias"].reshape(1))


def _refuse_what_is_there(uri: str, directory: Path) -> None:
    """Raise MisuseError where a package would take the place of what somebody needs, the checkpoint itself first."""
    here = local_path(uri)
    if here is not None and here.resolve() == directory.resolve():
        raise MisuseError(f"{uri}: that is the checkpoint; name another directory for the package")
    if exists(join(uri, CARD)):
        raise MisuseError(f"{uri}: a model package is there already; name another directory")
    # An import that was killed leaves a package without its card, which is made anew.
    if exists(join(uri, CONFIG)) and read_json(join(uri, CONFIG)).get("model_type") != MODEL_TYPE:
        raise MisuseError(f"{uri}: a model is there already; name another directory")


def _shared(directory: Path) -> dict[str, Tensor]:
    """The weights outside the towers, from whichever of the files they are in, fp32."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            found |= {name: weights.get_tensor(name).float() for name in SHARED if name in weights.keys()}  # noqa: SIM118
    if "logit_scale" not in found:
        raise MisuseError(f"{directory}: no logit_scale in its *.safetensors; save the whole model there, not a tower")
    return found


def _pictures(directory: Path, settings: Any) -> dict[str, Any]:
    """Side, mean and deviation of the pictures, by the vision tower and its image processor."""
    name = "preprocessor_config.json"
    if not (directory / name).is_file():
        name = "processor_config.json"  # where a processor of transformers 5 keeps it
    processor = _json(directory, name)
    processor = processor.get("image_processor", processor)
    side = getattr(settings, "image_size", None)
    if not isinstance(side, int):
        size = processor.get("crop_size") or processor.get("size") or {}
        side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    missing = [key for key in ("image_mean", "image_std") if key not in processor]
    if missing or not isinstance(side, int):
        raise MisuseError(f"{directory / name}: no {(missing or ['size'])[0]}; save the model's image processor there")
    return {
        "image_pixels": side,
        "pixel_mean": tuple(processor["image_mean"]),
        "pixel_std": tuple(processor["image_std"]),
    }


def _json(directory: Path, name: str) -> dict[str, Any]:
    try:
        fields = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MisuseError(
            f"{directory / name}: cannot be read ({reason}); give a directory of save_pretrained"
        ) from error
    if not isinstance(fields, dict):
        raise MisuseError(
            f"{directory / name}: a {type(fields).__name__} where settings should be; save the model again"
        )
    return fields
