"""A process that keeps a Ray cluster of several nodes on this machine: `python -m tests.training.ray_nodes`.

It is a separate process because a process has one Ray, and that of the test session has one node. It prints the
cluster's address, then reads one command a line and answers with one line. `add` answers with the process id of the new
node's raylet. `drain PROCESS SECONDS` announces, as a cloud does, that the node goes, and answers whether Ray accepts.
"""

from __future__ import annotations

import sys
import time

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

# A node counts as dead after two seconds of refused connections instead of fifteen. A slow one has ten to answer.
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
