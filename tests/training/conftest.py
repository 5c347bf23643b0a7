"""Trainings without faults, trained once for the session, to compare with."""

from __future__ import annotations

import pytest

from tests.training.trainings import STAGES, Trainings

KILLED_AT = 10


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def trainings(place: Trainings) -> Trainings:
    """Two ranks at each stage without a fault, and until one of them dies."""
    keep = {"checkpoints": {"keep_last": 9}}
    plans = [{"name": f"straight-{stage}", "training": {"zero_stage": stage, **keep}} for stage in STAGES]
    killed = {"name": "killed", "training": {"zero_stage": 2, **keep}, "die": [1, KILLED_AT]}
    place.run(2, *plans, killed, dies=True)
    assert [place.error(f"straight-{stage}") for stage in STAGES] == ["", "", ""]
    return place
