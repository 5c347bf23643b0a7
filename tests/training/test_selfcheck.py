"""The check of gradients on Ray's workers, as the command runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmflow.learning.objectives import ObjectivesConfig
from mmflow.models.config import ModelConfig
from mmflow.training.check import small_check
from mmflow.training.config import TrainingConfig
from mmflow.training.workers import compare_gradients_on_ray
from tests.tiny import SMALLEST_MODEL


@pytest.mark.slow  # a test of README's commands has workers compared too
def test_workers_descend_the_gradient_of_one_process(ray_cluster: None, tmp_path: Path) -> None:
    model = ModelConfig.model_validate({**SMALLEST_MODEL, "bias": -10.0})
    check = small_check(
        model,
        ObjectivesConfig.model_validate({"contrastive": {"weight": 0}, "sigmoid": {}}),
        TrainingConfig(num_workers=2, micro_batch_size=8),
    )
    found = compare_gradients_on_ray(check, str(tmp_path))
    assert [each.objective for each in found] == ["contrastive", "sigmoid"]
    assert all(each.equal for each in found), found
