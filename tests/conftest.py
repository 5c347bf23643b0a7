"""What tests share: one small Ray, started once for the session, and disks that are soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Read by Ray when it is imported, so set before any test module is.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# Of several processes that share the tests each has its part of the cores.
if count := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))

LONGEST = ("training", "pipelines", "test_readme", "cluster")

# A time limit for each example fails on a loaded machine, not on a broken program.
settings.register_profile("mmflow", deadline=None)
settings.load_profile("mmflow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two processes that share them neither is done long before the other."""
    items.sort(key=lambda item: not {item.path.stem, item.path.parent.name}.intersection(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Models run on Ray only in tests that ask for it, whichever test has started it."""
    with pytest.MonkeyPatch.context() as patch:
        if "ray_cluster" not in getattr(item, "fixturenames", ()):
            patch.setattr("mmflow.inference.runner.on_ray", lambda: False)
        return (yield)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """An embedded Ray of two CPUs. Its node has 30 s to start, which a loaded machine can miss: tried twice."""
    import ray

    for attempt in (1, 2):
        try:
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", configure_logging=True
            )
            break
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Sets the size of a disk of its own, first mounting it; skipped where one may not mount."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str) -> Path:
        again = "remount," if disk.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)
