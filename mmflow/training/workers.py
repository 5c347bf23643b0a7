"""Ray Train runs the ranks: starts them, restarts them when one fails or their machines change, tells them when one is
to go. Nothing else of training knows Ray."""

from __future__ import annotations

import os

from mmflow.errors import TrainingError
from mmflow.training.job import TrainingJob, run_rank

RUN = "ray"  # Ray Train's own directory
COLLATERAL = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def train_on_ray(job: TrainingJob, directory: str) -> None:
    """Train `job` with Ray Train, whose own files lie under `directory`; a second call goes on from the newest
    checkpoint.

    Ray must be initialised. Raises TrainingError once the workers have failed more often than the recipe allows.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = job.training
    accelerated = ray.cluster_resources().get("GPU", 0) >= config.least_workers  # type: ignore[no-untyped-call]
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if accelerated else {})
    hung_after = 60 * config.guards.hung_after_minutes
    # Of Ray's own exchanges between workers, which it does not limit unless told. Workers inherit it.
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(hung_after))
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=max(1, round(hung_after))),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=accelerated, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=RUN, storage_path=directory, failure_config=FailureConfig(max_failures=config.max_restarts)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"{job.stage}: {_cause(error)}; a rerun goes on from the last checkpoint") from error


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
