"""The smallest backbone of each kind, for tests of encoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, randint

from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig, VideoConfig
from mmflow.models.model import build_image_encoder, build_text_encoder

PIXELS, VOCABULARY = 16, 64
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}

# For pictures of 16 pixels: four patches, or what two halvings leave.
IMAGE: dict[str, dict[str, Any]] = {
    "vit": LAYERS | {"patch_size": 8},
    "resnet": {"embedding_size": 4, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
    "clip_vision_model": LAYERS | {"patch_size": 8, "projection_dim": 6},
    "siglip_vision_model": LAYERS | {"patch_size": 8},
    "dinov2": {name: value for name, value in LAYERS.items() if name != "intermediate_size"} | {"patch_size": 8},
}
TEXT: dict[str, dict[str, Any]] = {
    "bert": LAYERS | {"max_position_embeddings": 24},
    "roberta": LAYERS | {"max_position_embeddings": 24},
    "modernbert": LAYERS | {"max_position_embeddings": 24},
    "clip_text_model": LAYERS | {"max_position_embeddings": 24, "projection_dim": 6},
    "siglip_text_model": LAYERS | {"max_position_embeddings": 24, "projection_size": 8},
}
VITS = ("vit", "clip_vision_model", "siglip_vision_model", "dinov2")


def image_encoder(model_type: str, video: VideoConfig | None = None, **settings: Any) -> Any:
    """For pictures of 16 pixels; `options` override those of the smallest backbone."""
    options = IMAGE.get(model_type, {}) | settings.pop("options", {})
    config = ImageEncoderConfig(type=model_type, options=options, **settings)
    return build_image_encoder("m.image", config, PIXELS, video)


def text_encoder(model_type: str, max_tokens: int = 12, **settings: Any) -> Any:
    """For a vocabulary of 64; `options` override those of the smallest backbone."""
    options = TEXT.get(model_type, {}) | settings.pop("options", {})
    config = TextEncoderConfig.model_validate({"type": model_type, "options": options, **settings})
    return build_text_encoder("m.text", config, VOCABULARY, max_tokens)


def token_ids(batch_size: int, length: int) -> Tensor:
    """Ids without special tokens, each text closed by [SEP]."""
    ids = randint(5, VOCABULARY, (batch_size, length))
    ids[:, -1] = 3
    return ids
