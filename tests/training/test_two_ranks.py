"""Parts that call their weights in ways of their own train on two ranks that each hold half of every weight."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.two_ranks import MODELS, STEPS, WORLD_SIZE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.training.two_ranks"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD_SIZE)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=240)
            assert rank.returncode == 0, said[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_zero_3_trains_it_as_zero_0_does(directory: Path, name: str) -> None:
    found, other = (torch.load(directory / f"losses-{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE))
    assert found == other
    assert len(found[name, 3]) == STEPS
    assert all(math.isfinite(loss) for loss in found[name, 3])
    assert found[name, 3] == pytest.approx(found[name, 0], rel=1e-5)
    assert found[name, 3][0] != pytest.approx(found[name, 3][1], rel=1e-5)  # the first step did train
