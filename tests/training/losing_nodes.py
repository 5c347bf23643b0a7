"""A driver whose cluster loses its second node in the midst of a step, and gets another: `python -m
tests.training.losing_nodes DIRECTORY PLAN STEP`, the plan as JSON: a `Training`'s fields.

A process of its own: a session has one Ray, and that of the tests has one node.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from mmflow.training.telemetry import read_journal
from mmflow.training.workers import train_on_ray
from tests.training.faulty_ranks import Training, job_of


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    directory, step = Path(sys.argv[1]), int(sys.argv[3])
    plan = Training(**json.loads(sys.argv[2]))
    job = job_of(plan, directory)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)

    def lose_and_return() -> None:
        journal = Path(job.journal)
        while not any(line["step"] >= step for line in read_journal(journal) if "metrics" in line):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        while sum(line.get("event") == "started" for line in read_journal(journal)) < 2:
            time.sleep(0.1)
        cluster.add_node(num_cpus=1)

    threading.Thread(target=lose_and_return, daemon=True).start()
    try:
        train_on_ray(job, str(directory / plan.name))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
