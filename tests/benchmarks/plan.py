"""The plan of a billion samples in a hundred thousand shards: what it takes to build, to hold, and to seek in."""

from __future__ import annotations

import time

from tests.benchmarks.measure import SHARE, call, rounds
from tests.benchmarks.table import Row, bounded

NUM_SHARDS = 100_000
SHARD_SAMPLES = 10_000
GLOBAL_BATCH_SIZE = 4_096
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
    seek = f"{GLOBAL_BATCH_SIZE:,} slots at a random position; {NUM_SEEKS:,} of them"
    return [
        bounded(
            f"plan an epoch of {size}", seconds, unit="s", most=2, note="from the shards' sizes to the first batch"
        ),
        bounded("memory of the process", [each["mib"] for each in found], unit="MiB", most=200, note="at its peak"),
        bounded("seek, median", [each["median"] for each in found], unit="ms", most=1, note=seek),
        bounded("seek, slowest in a hundred", [each["slow"] for each in found], unit="ms", most=1, note=seek),
    ]


# --- called in a process of its own -----------------------------------------------------------------------------------


def plan(num_shards: int) -> dict[str, float]:
    """Seconds to the first batch, milliseconds of seeks, and MiB of the process at its peak."""
    import random
    import re
    from pathlib import Path

    from mmflow.loading.plan import LoaderState, Order

    shard_samples = (SHARD_SAMPLES,) * num_shards
    began = time.perf_counter()
    order = Order(shard_samples=shard_samples, global_batch_size=GLOBAL_BATCH_SIZE, seed=7)
    order.batch(LoaderState(3))
    build = time.perf_counter() - began
    generator = random.Random(7)
    seeks = []
    for _ in range(NUM_SEEKS):
        state = LoaderState(3, generator.randrange(order.num_samples))
        began = time.perf_counter()
        order.batch(state)
        seeks.append(1_000 * (time.perf_counter() - began))
    seeks.sort()
    # Not getrusage: its mark is that of the process which started this one, where that held more.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    mib = int(peak[1]) / 1_024
    return {"build": build, "median": seeks[len(seeks) // 2], "slow": seeks[len(seeks) * 99 // 100], "mib": mib}
