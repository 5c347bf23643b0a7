"""Ray Train runs the ranks: starts them, restarts them when one fails or their machines change, tells them when one is
to go. Nothing else of training knows Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from mmflow.core.errors import TrainingError
from mmflow.training.engine import check_fp16
from mmflow.training.job import TrainingJob
from mmflow.training.rank import run_rank
from mmflow.training.selfcheck import Compared, GradientCheck, compare_gradients

RUN = "ray"  # Ray Train's own directory
COLLECTIVE_TIMEOUT = "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"  # which workers inherit
COLLATERAL = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def train_on_ray(job: TrainingJob, directory: str) -> None:
    """Train `job` with Ray Train, whose own files lie under `directory`; a second call goes on from the newest
    checkpoint.

    Ray must be initialised. Raises TrainingError once the workers have failed more often than the recipe allows.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = job.training
    accelerated = _accelerated(config.least_workers)
    if config.precision == "fp16":
        check_fp16(f"{job.stage}.training", accelerated)
    hung_after = 60 * config.guards.hung_after_minutes
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=max(1, round(hung_after))),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,  # type: ignore[arg-type]  # Ray's stub does not know the pair
            use_gpu=accelerated,
            resources_per_worker=_resources(config.cpus_per_worker, accelerated),
        ),
        run_config=RunConfig(
            name=RUN, storage_path=directory, failure_config=FailureConfig(max_failures=config.max_restarts)
        ),
    )
    try:
        with limited_exchanges(hung_after):
            trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"{job.stage}: {_cause(error)}; a rerun goes on from the last checkpoint") from error


def compare_gradients_on_ray(
    check: GradientCheck, *, num_workers: int, cpus_per_worker: int, directory: str
) -> list[Compared]:
    """What `compare_gradients` finds on that many workers; Ray Train's own files lie under `directory`.

    Ray must be initialised. Raises TrainingError where the workers fail.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    accelerated = _accelerated(num_workers)
    trainer = TorchTrainer(
        _compare_on_worker,  # type: ignore[arg-type]  # Ray's stub knows no result of it
        train_loop_config={"check": check},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=accelerated,
            resources_per_worker=_resources(cpus_per_worker, accelerated),
        ),
        run_config=RunConfig(name=RUN, storage_path=directory),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"selfcheck: {_cause(error)}") from error
    # Not its metrics: Ray Train keeps those of a report that brings a checkpoint alone.
    found: list[Compared] = result.return_value
    return found


@contextlib.contextmanager
def limited_exchanges(seconds: float) -> Iterator[None]:
    """Limit Ray's own exchanges between workers, which it does not unless the environment says so: what this process
    was started with, or else `seconds`, for this training alone, because the next may have another limit."""
    if COLLECTIVE_TIMEOUT in os.environ:
        yield
        return
    os.environ[COLLECTIVE_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        del os.environ[COLLECTIVE_TIMEOUT]


def _compare_on_worker(config: dict[str, GradientCheck]) -> list[Compared]:
    return compare_gradients(config["check"])


def _accelerated(num_workers: int) -> bool:
    """Whether there is an accelerator for each worker."""
    import ray

    found: float = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    return found >= num_workers


def _resources(cpus_per_worker: int, accelerated: bool) -> dict[str, float]:
    return {"CPU": cpus_per_worker, **({"GPU": 1} if accelerated else {})}


def _cause(error: Exception) -> str:
    """The rank that failed and the line of its own error, out of the tracebacks that Ray wraps it in."""
    failures = getattr(error, "worker_failures", {})
    lines = {rank: _last_line(failure) for rank, failure in sorted(failures.items())}
    # When a rank dies, the others fail in their exchanges with it.
    own = {rank: line for rank, line in lines.items() if not any(word in line for word in COLLATERAL)}
    for rank, line in (own or lines).items():
        return f"rank {rank}: {line}"
    return _last_line(error)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _run_worker(config: dict[str, TrainingJob]) -> None:
    run_rank(config["job"], _preempted)


def _preempted() -> bool:
    import ray.train

    return ray.train.get_preemption_info() is not None
