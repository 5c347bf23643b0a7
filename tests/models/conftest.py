"""The smallest dual encoder that is one: two convolutions, one layer of BERT."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer

from mmflow.loading.tokens import train_tokenizer
from mmflow.models.config import ModelConfig

TINY: dict[str, Any] = {
    "image": {
        "type": "resnet",
        "options": {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"},
        "pooling": "pooler",
    },
    "text": {
        "type": "bert",
        "options": {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 16,
        },
        "pooling": "mean",
    },
    "embedding_width": 6,
    "image_pixels": 16,
    "max_tokens": 8,
    "vocabulary_size": 64,
}


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig.model_validate(TINY)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["red apple", "green pear", "apple tree"], 64)
