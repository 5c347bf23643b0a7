"""Ray Train runs the ranks: it starts them, restarts them when one fails or their machines change, and tells them when
a machine will be taken away. Nothing else in training/ knows Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmflow.core.errors import TrainingError
from mmflow.training.check import Compared, GradientCheck, compare_gradients
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import check_fp16
from mmflow.training.job import TrainingJob
from mmflow.training.rank import run_rank

RUN = "ray"  # Ray Train's own directory
COLLECTIVE_TIMEOUT = "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"  # which workers inherit
COLLATERAL = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def train_on_ray(job: TrainingJob, directory: str) -> None:
    """Train `job` with Ray Train, which keeps its own files under `directory`; a second call resumes from the newest
    checkpoint.

    Ray must be initialised. Raises TrainingError once the workers have failed more often than the recipe allows.
    """
    advice = "a rerun resumes from the last checkpoint"
    _fit(_run_worker, {"job": job}, job.training, directory, stage=job.stage, advice=advice)


def compare_gradients_on_ray(check: GradientCheck, directory: str) -> list[Compared]:
    """The result of `compare_gradients` on the check's number of workers; Ray Train keeps its own files under
    `directory`.

    Ray must be initialised. Raises TrainingError where the workers fail.
    """
    advice = "correct it and run the check again"
    compared: list[Compared] = _fit(
        _compare_on_worker, {"check": check}, check.training, directory, stage="selfcheck", advice=advice
    )
    return compared


def _fit(
    run_worker: Callable[[Any], object],
    argument: Mapping[str, Any],
    config: TrainingConfig,
    directory: str,
    *,
    stage: str,
    advice: str,
) -> Any:
    """Run a function on Ray Train's workers; what it returns on the first."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpus: float = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    accelerated = gpus >= config.least_workers
    if config.precision == "fp16":
        check_fp16(f"{stage}.training", accelerated)
    hung_after = 60 * config.guards.hung_after_minutes
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type]  # Ray's stub knows no result of it
        train_loop_config=dict(argument),
        torch_config=TorchConfig(timeout_s=max(1, round(hung_after))),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,  # type: ignore[arg-type]  # Ray's stub does not know the pair
            use_gpu=accelerated,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if accelerated else {})},
        ),
        run_config=RunConfig(
            name=RUN, storage_path=directory, failure_config=FailureConfig(max_failures=config.max_restarts)
        ),
    )
    try:
        with limited_exchanges(hung_after):
            # Not its metrics: Ray Train keeps only those of a report that brings a checkpoint.
            result: Any = trainer.fit()
            return result.return_value
    except TrainingFailedError as error:
        raise TrainingError(f"{stage}: {_cause(error)}; {advice}") from error


@contextlib.contextmanager
def limited_exchanges(seconds: float) -> Iterator[None]:
    """Limit Ray's own exchanges between workers, which it does only if the environment says so: to the environment's
    value, or else to `seconds`, for this training alone, because the next may have another limit."""
    if COLLECTIVE_TIMEOUT in os.environ:
        yield
        return
    os.environ[COLLECTIVE_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        del os.environ[COLLECTIVE_TIMEOUT]


def _run_worker(config: dict[str, TrainingJob]) -> None:
    run_rank(config["job"], _preempted)


def _preempted() -> bool:
    import ray.train

    return ray.train.get_preemption_info() is not None


def _compare_on_worker(config: dict[str, GradientCheck]) -> list[Compared]:
    return compare_gradients(config["check"])


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
