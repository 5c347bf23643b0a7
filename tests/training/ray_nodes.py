"""A process that keeps a Ray cluster of several nodes on this machine: `python -m tests.training.ray_nodes`.

A process of its own, because a session has one Ray, and that of the tests has one node. It says the cluster's address,
then reads one command a line and answers with one line: `add` with the process of the new node's raylet; `drain
PROCESS SECONDS`, as a cloud does before it takes a machine away, with whether Ray accepts that.
"""

from __future__ import annotations

import sys
import time

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

# A node is dead after two seconds of refused connections, in place of fifteen. One that is slow has ten to answer.
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 2}


def main() -> None:
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        print(cluster.address, flush=True)
        nodes = {}
        for line in sys.stdin:
            command, *arguments = line.split()
            if command == "add":
                node = cluster.add_node(num_cpus=1)
                process = node.all_processes["raylet"][0].process.pid
                nodes[process] = node.node_id
                print(process, flush=True)
            elif command == "drain":
                process, seconds = map(int, arguments)
                client = ray._raylet.GcsClient(address=cluster.address)
                accepted, _ = client.drain_node(
                    nodes[process],
                    autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                    "spot",
                    int(1000 * (time.time() + seconds)),
                )
                print(accepted, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
