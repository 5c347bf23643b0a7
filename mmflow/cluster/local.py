"""The Ray that a stage runs on: the cluster that the job was submitted to, or one embedded in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from mmflow.core.errors import ClusterError

STARTS = 2  # a node must be up within a fixed 30 s, which a loaded machine misses now and then


def ensure_ray(num_cpus: int) -> None:
    """Connect to RAY_ADDRESS where it is set, as within a submitted job; else start Ray here, once a process.

    An embedded Ray offers at least `num_cpus`, so that a recipe for two workers also runs on one core. Raises
    ClusterError where neither works or a cluster is too small, which Ray itself would wait out for ever.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; unset, Ray warns each task
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Ray's C++ side writes over a user's terminal; every line is in the session's log files too.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # says that tokens are on, as they should
    import ray

    if not ray.is_initialized():
        _start(num_cpus)
        _quieten()
    available: float = cluster_resources("CPU")
    if available < num_cpus and not _autoscales():
        raise ClusterError(f"this Ray cluster has {available:g} CPUs, the recipe's stage needs {num_cpus}; add nodes")


def _start(num_cpus: int) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"address": "auto"}
    if not address:
        cpus = max(num_cpus, os.cpu_count() or 1)
        settings = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    for attempt in range(1, STARTS + 1):
        try:
            with _native_stderr_closed():
                ray.init(**settings, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # a bare one where the node is not up in time
            ray.shutdown()
            if address or attempt == STARTS:
                where = f"RAY_ADDRESS={address}" if address else "an embedded Ray"
                raise ClusterError(f"{where} cannot be reached or started: {str(error).splitlines()[0]}") from error
            time.sleep(2)
        else:
            return


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Keep Ray's C++ side from announcing on a user's terminal that it was asked to be quiet. Errors are raised."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cluster_resources(kind: str) -> float:
    """How much of a resource ("CPU", "GPU") the Ray at hand has."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get(kind, 0.0)


def _autoscales() -> bool:
    """Whether more nodes may come: only then is it right to wait for CPUs that are not there."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _quieten() -> None:
    from ray.data import DataContext

    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def stop_ray() -> None:
    """Stop the embedded Ray, or leave the cluster."""
    import sys

    if "ray" in sys.modules:
        import ray

        ray.shutdown()
