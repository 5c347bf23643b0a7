"""A dual encoder as a directory that `transformers` loads by itself: CLIP's layout, SigLIP's, or
VisionTextDualEncoder's, whichever holds its towers."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmflow.core.errors import MisuseError, MmflowError
from mmflow.loading.tokens import special_tokens
from mmflow.models.encoders import ImageEncoder, TextEncoder
from mmflow.models.exchange.probe import TOLERANCE, probe
from mmflow.models.package import PREPROCESSOR, TOKENIZER, LoadedModel, preprocessor

# Shapes: B texts and as many pictures.

ONNX_INSTEAD = "retrain with another, or export the two towers to ONNX, which holds any"


class Exported(NamedTuple):
    """What was written: the layout's `model_type`, and the largest difference of logits on probe inputs."""

    layout: str
    difference: float


def export_transformers(loaded: LoadedModel, directory: str | Path) -> Exported:
    """Write the two towers, their projections and the scale, the tokenizer and the image processor; a fusion, heads and
    a decoder stay behind.

    The directory appears whole, after the model loaded from it has given the same logits to 1e-4. Raises MisuseError
    where it exists or no layout holds the towers, MmflowError where the logits differ.
    """
    directory = Path(directory)
    if directory.exists():
        raise MisuseError(f"{directory}: exists; name a new directory, or remove it")
    whole = _whole(loaded)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        staging = Path(scratch) / directory.name
        whole.save_pretrained(staging)
        _write_tokenizer(loaded, staging)
        (staging / PREPROCESSOR).write_text(json.dumps(preprocessor(loaded.config), indent=2) + "\n")
        difference = _difference(loaded, type(whole).from_pretrained(staging, local_files_only=True).eval())
        if not difference <= TOLERANCE:
            raise MmflowError(f"{directory}: logits differ by {difference:.2g}, more than {TOLERANCE}; nothing written")
        os.replace(staging, directory)
    return Exported(whole.config.model_type, difference)


def _whole(loaded: LoadedModel) -> Any:
    """The model of `transformers` with our weights."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        SiglipConfig,
        SiglipModel,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    model = loaded.model
    image, text, scale = model.image, model.text, model.scale
    if not isinstance(image, ImageEncoder) or not isinstance(text, TextEncoder) or scale is None:
        raise MisuseError(
            "model: transformers' dual encoders read one picture and one run of tokens; leave out video and "
            "text.windows, and give the model an embedding_width"
        )
    vision, words = image.backbone, text.backbone
    kinds = vision.config.model_type, words.config.model_type
    _check_pooling(loaded, image, kinds)
    towers = {"vision_config": vision.config.to_dict(), "text_config": words.config.to_dict()}
    biased, width = scale.logit_bias is not None, model.embedding_width or 0
    if kinds == ("siglip_vision_model", "siglip_text_model") and biased:
        if not all(_is_identity(each) for each in (model.image_projection, model.text_projection)):
            raise MisuseError(f"model.embedding_width: SigLIP's layout has no projections, this has; {ONNX_INSTEAD}")
        whole: Any = SiglipModel(SiglipConfig(**towers))
    elif biased:
        raise MisuseError(f"model.bias: of all layouts SigLIP's alone has one, and this is of {kinds}; {ONNX_INSTEAD}")
    elif kinds == ("clip_vision_model", "clip_text_model"):
        whole = CLIPModel(CLIPConfig(**towers, projection_dim=width))
    else:
        try:
            whole = VisionTextDualEncoderModel(VisionTextDualEncoderConfig(**towers, projection_dim=width))
        except ValueError as error:  # of siglip_text_model, which no AutoModel makes
            raise MisuseError(
                f"model: transformers' VisionTextDualEncoder cannot hold {kinds}; {ONNX_INSTEAD}"
            ) from error
    _copy(whole.vision_model, vision)
    _copy(whole.text_model, words)
    with torch.no_grad():
        for ours, name in ((model.image_projection, "visual_projection"), (model.text_projection, "text_projection")):
            if hasattr(whole, name):
                getattr(whole, name).load_state_dict(ours.state_dict() if ours is not None else {})
        # Ours are of shape (1,), of theirs some are of shape ().
        found = scale()
        whole.logit_scale.copy_(found.logit_scale.log().reshape(whole.logit_scale.shape))
        if found.logit_bias is not None:
            whole.logit_bias.copy_(found.logit_bias.reshape(whole.logit_bias.shape))
    return whole.eval()


def _check_pooling(loaded: LoadedModel, image: ImageEncoder, kinds: tuple[str, str]) -> None:
    asked = {"image": loaded.config.image.pooling, "text": loaded.config.text.pooling if loaded.config.text else None}
    if kinds[1] == "clip_text_model" and asked["text"] == "eos":
        asked["text"] = "pooler"  # another word for the same
    for (side, pooling), kind in zip(asked.items(), kinds, strict=True):
        if pooling != "pooler":
            raise MisuseError(
                f"model.{side}.pooling: {pooling}, and transformers' dual encoders read {kind}'s pooler; {ONNX_INSTEAD}"
            )
    if getattr(image.backbone.config, "hidden_sizes", None):
        raise MisuseError(
            f"model.image: {kinds[0]} gives a map, and transformers' dual encoders project vectors; {ONNX_INSTEAD}"
        )


def _is_identity(projection: nn.Linear | None) -> bool:
    weight = None if projection is None else projection.weight
    return weight is not None and torch.equal(weight, torch.eye(*weight.shape))


def _copy(theirs: Any, ours: Any) -> None:
    found = theirs.load_state_dict(ours.state_dict(), strict=False)
    # DINOv2's, of a task that is not ours, is left out of our encoders.
    lost = [name for name in (*found.missing_keys, *found.unexpected_keys) if not name.endswith("mask_token")]
    if lost:
        raise MmflowError(f"{ours.config.model_type}: {lost[0]} has no place in the layout; {ONNX_INSTEAD}")


def _write_tokenizer(loaded: LoadedModel, directory: Path) -> None:
    marks = special_tokens(loaded.tokenizer)
    named = {"pad_token": marks.pad, "unk_token": marks.unknown, "cls_token": marks.first, "sep_token": marks.last}
    tokens = {name: loaded.tokenizer.id_to_token(mark) for name, mark in named.items() if mark is not None}
    settings: dict[str, Any] = {
        **tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": loaded.config.max_tokens,
    }
    (directory / TOKENIZER).write_text(loaded.tokenizer.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def _difference(loaded: LoadedModel, whole: Any) -> float:
    """The largest difference between our logits (B, B) and those of the model of `transformers`."""
    pixels, token_ids, token_mask = probe(loaded, rows=4)
    outputs = loaded.model(pixels, token_ids, token_mask)
    expected = outputs["logit_scale"] * outputs["text_embedding"] @ outputs["image_embedding"].T
    expected = expected + outputs.get("logit_bias", torch.zeros(1))
    mask: Tensor | None = token_mask
    if whole.config.model_type == "siglip":  # it reads texts padded to their whole length, and no mask
        text = whole.config.text_config
        token_ids = token_ids.masked_fill(token_mask == 0, text.pad_token_id)
        room = text.max_position_embeddings - token_ids.shape[1]
        token_ids, mask = nn.functional.pad(token_ids, (0, room), value=text.pad_token_id), None
    found = whole(input_ids=token_ids, attention_mask=mask, pixel_values=pixels).logits_per_text
    return float((found - expected).abs().max())
