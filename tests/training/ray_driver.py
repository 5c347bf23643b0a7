"""A driver that trains on the Ray cluster at RAY_ADDRESS: `python -m tests.training.ray_driver DIRECTORY PLAN`, the
plan as JSON: a `Training`'s fields. With MLFLOW_TRACKING_URI its journal is mirrored, as a stage's is."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmflow.registry.tracking import TrainingRun, mirror
from mmflow.training import loop, workers
from mmflow.training.job import TrainingJob
from tests.training.faulty_ranks import Training, job_of, run

RUN = TrainingRun(experiment="faults", name="pretrain", identity="0123456789ab")


def meeting_faults(plan: Training, directory: Path) -> Callable[[dict[str, TrainingJob]], None]:
    """What each worker runs in place of the training alone."""

    def run_worker(config: dict[str, TrainingJob]) -> None:
        loop.ASK_EVERY_SECONDS = 0.0  # at each line of the journal
        run(plan, directory, workers._preempted)

    return run_worker


def main() -> None:
    directory = Path(sys.argv[1])
    fields: dict[str, Any] = json.loads(sys.argv[2])
    plan = Training(**{**fields, "halts": tuple(fields.get("halts", ()))})
    import ray
    import ray.train

    # By default Ray looks for new nodes every minute and for draining ones every five seconds, and after a loss waits a
    # minute for as many workers as before.
    ray.train.ScalingConfig = partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1)
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    workers._run_worker = meeting_faults(plan, directory)
    ray.init()
    job = job_of(plan, directory)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    tracked = mirror(Path(job.journal), RUN, uri=uri) if uri else contextlib.nullcontext()
    with tracked:
        workers.train_on_ray(job, str(directory / plan.name))


if __name__ == "__main__":
    main()
