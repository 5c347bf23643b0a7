"""Fixtures of the tests of models."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from mmflow.loading.tokens import train_tokenizer
from mmflow.models.config import ModelConfig
from tests.tiny import SMALLEST_MODEL


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig.model_validate(SMALLEST_MODEL)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["red apple", "green pear", "apple tree"], 64)
