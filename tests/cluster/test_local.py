"""The Ray that a command starts for itself."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from mmflow.cluster import local
from mmflow.core.errors import ClusterError


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What Ray's next starts raise."""
    failures: list[Exception] = []

    def init(**settings: Any) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(local, "_quieten", lambda: None)
    monkeypatch.setattr(local, "cluster_resources", lambda kind: 4.0)
    monkeypatch.setattr(local.time, "sleep", lambda seconds: None)
    return failures


LATE = "The current node timed out during startup."  # which Ray raises as a bare Exception


def test_a_node_that_is_not_up_in_time_is_started_again(failures: list[Exception]) -> None:
    failures += [Exception(LATE)]
    local.ensure_ray(num_cpus=1)
    assert failures == []


def test_a_node_that_never_is_up_is_one_line(failures: list[Exception]) -> None:
    failures += [Exception(f"{LATE}\nand more")] * local.STARTS
    with pytest.raises(ClusterError, match=rf"^an embedded Ray cannot be reached or started: {LATE}$"):
        local.ensure_ray(num_cpus=1)
