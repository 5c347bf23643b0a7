"""What tests share: one small Ray, started once for the session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Read by Ray when it is imported, so set before any test module is.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# A time limit for each example fails on a loaded machine, not on a broken program.
settings.register_profile("mmflow", deadline=None)
settings.load_profile("mmflow")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """An embedded Ray of two CPUs. Its node has 30 s to start, which a loaded machine can miss: tried twice."""
    import ray

    for attempt in (1, 2):
        try:
            ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", configure_logging=True)
            break
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()
