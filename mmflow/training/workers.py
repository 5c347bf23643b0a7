"""Ray Train runs the ranks: starts them, restarts them from the last checkpoint, keeps the checkpoints. Nothing else
of training knows Ray."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from mmflow.errors import TrainingError
from mmflow.training.engine import check_fp16
from mmflow.training.job import TrainingJob, run_rank
from mmflow.training.selfcheck import Compared, GradientCheck, compare_gradients

CHECKPOINTS = "checkpoints"
KEPT_CHECKPOINTS = 2  # the newest, and the one before it in case the newest cannot be read


def train_on_ray(job: TrainingJob, directory: str) -> None:
    """Train `job` with Ray Train, checkpoints under `directory`; a second call goes on from the last one.

    Ray must be initialised. Raises TrainingError once the workers have failed more often than the recipe allows.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    accelerated = _accelerated(job.training.most_workers)
    if job.training.precision == "fp16":
        check_fp16(f"{job.stage}.training", accelerated)
    resources = _resources(job.training.cpus_per_worker, accelerated)
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=job.training.num_workers, use_gpu=accelerated, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=directory,
            failure_config=FailureConfig(max_failures=job.training.max_restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"{job.stage}: {_cause(error)}; a rerun goes on from the last checkpoint") from error


def _accelerated(num_workers: int) -> bool:
    """Whether there is an accelerator for each worker."""
    import ray

    found: float = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    return found >= num_workers


def _resources(cpus_per_worker: int, accelerated: bool) -> dict[str, float]:
    return {"CPU": cpus_per_worker} | ({"GPU": 1} if accelerated else {})


def compare_gradients_on_ray(
    check: GradientCheck, *, num_workers: int, cpus_per_worker: int, directory: str
) -> list[Compared]:
    """What `compare_gradients` finds on that many workers; Ray Train writes what it must under `directory`.

    Ray must be initialised. Raises TrainingError where the workers fail.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = TorchTrainer(
        _compare_on_worker,
        train_loop_config={"check": check},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=_accelerated(num_workers),
            resources_per_worker=_resources(cpus_per_worker, _accelerated(num_workers)),
        ),
        run_config=RunConfig(name="selfcheck", storage_path=directory),
    )
    try:
        found = trainer.fit().metrics
    except TrainingFailedError as error:
        raise TrainingError(f"selfcheck: {_cause(error)}") from error
    assert found is not None, "rank 0 reports"
    return [Compared(**each) for each in found["compared"]]


def _compare_on_worker(config: dict[str, GradientCheck]) -> None:
    import ray.train

    ray.train.report({"compared": [asdict(each) for each in compare_gradients(config["check"])]})


def _cause(error: Exception) -> str:
    """The line of a worker's own error, out of the tracebacks that Ray wraps it in."""
    text = str(error)
    for failure in getattr(error, "worker_failures", {}).values():
        text = str(failure)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _run_worker(config: dict[str, TrainingJob]) -> None:
    job = config["job"]
    run_rank(job, _RayHost())


class _RayHost:
    """Checkpoints through Ray Train: every rank reports its part, and Ray merges and publishes them."""

    @contextlib.contextmanager
    def restore(self) -> Iterator[Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield Path(directory)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        import ray.train

        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory))
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))
