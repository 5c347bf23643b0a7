"""The smallest of each backbone that the encoders are tested with."""

from __future__ import annotations

from typing import Any

LAYERS: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}

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
