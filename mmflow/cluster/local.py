"""The Ray that a stage runs on: the cluster that the job was submitted to, or one embedded in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from mmflow.core.errors import ClusterError

STARTS = 2  # a node must be up within a fixed 30 s, which a loaded machine sometimes misses
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; if unset, Ray warns at each task
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of tasks that nobody waits for after another one has failed
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ side writes to the terminal; each line is in the log files too
    "TOKENIZERS_PARALLELISM": "false",
}


def ensure_ray(num_cpus: int) -> None:
    """Connect to RAY_ADDRESS if it is set, as in a submitted job; else start Ray here, once a process.

    An embedded Ray offers at least `num_cpus`, so that a recipe for two workers also runs on one core. Raises
    ClusterError if neither works, or if a cluster is too small: Ray itself would wait for ever.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that tokens are on
    import ray

    if not ray.is_initialized():
        _start(num_cpus)
        _quieten()
    available = cluster_resources("CPU")
    autoscales = bool(os.environ.get("RAY_ADDRESS"))  # more nodes may come, so waiting for CPUs is right
    if available < num_cpus and not autoscales:
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
        except Exception as error:  # a bare Exception if the node is not up in time
            ray.shutdown()
            if address or attempt == STARTS:
                where = f"RAY_ADDRESS={address}" if address else "an embedded Ray"
                raise ClusterError(f"{where} cannot be reached or started: {str(error).splitlines()[0]}") from error
            time.sleep(2)
        else:
            return


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Keep Ray's C++ side from writing to the terminal that it has been asked to be quiet. Errors are raised."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cluster_resources(kind: str) -> float:
    """How much of a resource ("CPU", "GPU") this Ray has."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get(kind, 0.0)


def _quieten() -> None:
    from ray.data import DataContext

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error it raises too
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def stop_ray() -> None:
    """Stop the embedded Ray, or leave the cluster."""
    import ray

    ray.shutdown()
