"""The plan of a billion samples in a hundred thousand shards: time to build, memory, and time to seek."""

from __future__ import annotations

import time

from tests.benchmarks.measure import SHARE, call, high_water_mark, rounds
from tests.benchmarks.table import Row, bounded

NUM_SHARDS = 100_000
SHARD_SAMPLES = 10_000
GLOBAL_BATCH_SIZES = (1_024, 4_096)
NUM_SEEKS = 2_000
PEERS = ()
VERSIONS = ("numpy",)


def run() -> list[Row]:
    """A process a round, which does nothing else: the memory is all of it, Python and numpy included."""
    num_shards = max(100, round(NUM_SHARDS * SHARE))
    found: list[dict[str, float]] = []

    def planned() -> float:
        found.append(call("tests.benchmarks.plan:plan", num_shards=num_shards))
        return found[-1]["build"]

    seconds = rounds({"build": planned})["build"]
    size = f"{num_shards * SHARD_SAMPLES:,} samples in {num_shards:,} shards"
    note = f"{NUM_SEEKS:,} seeks to random positions of an epoch"
    rows = [
        bounded(f"plan an epoch of {size}", seconds, unit="s", most=2, note="to the end of its first batch"),
        bounded("memory of the process", [each["mib"] for each in found], unit="MiB", most=200, note="at its peak"),
    ]
    for batch in GLOBAL_BATCH_SIZES:
        for name in ("median", "slowest in a hundred"):
            values = [each[f"{name} {batch}"] for each in found]
            rows.append(bounded(f"seek, {batch:,} slots: {name}", values, unit="ms", most=1, note=note))
    return rows


# --- called in a process of its own -----------------------------------------------------------------------------------


def plan(num_shards: int) -> dict[str, float]:
    """Seconds to the first batch, milliseconds of seeks, and MiB of the process at its peak."""
    import random

    from mmflow.loading.plan import LoaderState, Order

    shard_samples = (SHARD_SAMPLES,) * num_shards
    generator = random.Random(7)
    found = {}
    for batch in GLOBAL_BATCH_SIZES:
        began = time.perf_counter()
        order = Order(shard_samples, batch, seed=7)
        order.batch(LoaderState(3))
        found.setdefault("build", time.perf_counter() - began)  # the first: numpy's code is not in memory yet
        seeks = []
        for _ in range(NUM_SEEKS):
            state = LoaderState(3, generator.randrange(order.num_samples))
            began = time.perf_counter()
            order.batch(state)
            seeks.append(1_000 * (time.perf_counter() - began))
        seeks.sort()
        found[f"median {batch}"], found[f"slowest in a hundred {batch}"] = (
            seeks[len(seeks) // 2],
            seeks[-len(seeks) // 100],
        )
    return {**found, "mib": high_water_mark() / 2**20}
