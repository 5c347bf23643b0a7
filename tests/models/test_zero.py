"""A model with every part, with tied and shared weights, trains the same under every ZeRO stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmflow.models.encoders import parameter_count
from tests.models.trained_with_zero import CLASSES, CONFIG, VOCABULARY, ZERO_STAGES, build, fresh


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the process wrote, for each stage."""
    path = tmp_path_factory.mktemp("zero")
    command = [sys.executable, "-m", "tests.models.trained_with_zero", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def result(directory: Path, zero_stage: int) -> dict[str, Any]:
    return dict(torch.load(directory / f"{zero_stage}.pt", weights_only=True))


@pytest.mark.parametrize("zero_stage", ZERO_STAGES[1:])
def test_every_stage_trains_like_stage_0(directory: Path, zero_stage: int) -> None:
    plain, partitioned = result(directory, 0), result(directory, zero_stage)
    assert partitioned["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert partitioned["losses"][-1] < partitioned["losses"][0]
    assert partitioned["after"].keys() == plain["after"].keys()
    for name, value in plain["after"].items():
        torch.testing.assert_close(partitioned["after"][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_trained_weights_load_into_a_fresh_model_and_a_restart(directory: Path, zero_stage: int) -> None:
    trained = result(directory, zero_stage)
    assert trained["parameters"] == parameter_count(fresh())
    model = build("pretrain.model", CONFIG, VOCABULARY, seed=2, num_classes=CLASSES)
    model.load_state_dict(trained["after"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained["after"][name]), name
        assert torch.equal(trained["again"][name], trained["after"][name]), name
    words = model.text.backbone.get_input_embeddings().weight
    assert model.heads["masked_language"].output.weight is words
    assert not torch.equal(words, fresh().text.backbone.get_input_embeddings().weight)
