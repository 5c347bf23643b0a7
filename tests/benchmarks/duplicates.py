"""Near-duplicate search over a million 64-bit hashes, compared with faiss's exhaustive binary index."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tests.benchmarks import peers
from tests.benchmarks.measure import CORES, RUNS, SCRATCH, SHARE, call, rounds
from tests.benchmarks.table import Row, bounded, faster

NUM_HASHES = 1_000_000
NUM_PLANTED = 20_000  # hashes that are near copies of others
RADIUS = 3
FAISS_QUERIES = 20_000  # of all against all it would need a quarter of an hour
PEERS = ("faiss-cpu",)
VERSIONS = ("numpy",)


def run() -> list[Row]:
    """All pairs within three bits, planted among random hashes; both sides must find every planted one."""
    peers.python()
    hashes = SCRATCH / "hashes.npy"
    count = max(1_000, round(NUM_HASHES * SHARE))
    planted = call("tests.benchmarks.duplicates:plant", path=str(hashes), count=count)
    queries = min(FAISS_QUERIES, count)
    seconds: list[float] = []

    def ours() -> float:
        found = call("tests.benchmarks.duplicates:search", path=str(hashes))
        assert found["pairs"] >= planted, f"{found['pairs']} pairs found, {planted} planted"
        seconds.append(found["seconds"])
        return float(count / found["seconds"])

    def theirs() -> float:
        arguments = {"hashes": str(hashes), "queries": queries, "radius": RADIUS, "threads": CORES}
        found = peers.call_peer("faiss_range_search", **arguments)
        return float(queries / found["seconds"])

    found = rounds({"mmflow": ours, "faiss": theirs}, RUNS)
    print(f"  {statistics.median(seconds):.1f} s for {count:,} hashes", flush=True)
    return [
        bounded(f"near pairs among {count:,} hashes, radius {RADIUS}", seconds, unit="s", most=60,
                note=f"{planted:,} planted, all found"),
        faster("the same, by hashes searched", found["mmflow"], "faiss IndexBinaryFlat.range_search", found["faiss"],
               unit="hashes/s", note=f"faiss searches for {queries:,} of them; 2 threads"),
    ]  # fmt: skip


# --- called in processes of their own ---------------------------------------------------------------------------------


def plant(path: str, count: int) -> int:
    """Write random hashes, some of them near copies of others, and return how many pairs that makes at least."""
    import numpy as np

    random = np.random.default_rng(7)
    hashes = random.integers(0, 2**64, count, np.uint64)
    num_planted = min(NUM_PLANTED, count // 4)
    chosen = random.permutation(count)[: 2 * num_planted]
    bits = random.integers(0, 64, (num_planted, RADIUS)).astype(np.uint64)  # the same bit twice is no change: fine
    flips = np.bitwise_xor.reduce(np.uint64(1) << bits, axis=1)
    hashes[chosen[:num_planted]] = hashes[chosen[num_planted:]] ^ flips
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.save(path, hashes)
    return int(num_planted)


def search(path: str) -> dict[str, float]:
    """Seconds and pairs of our search, on the cores that its process may use."""
    import numpy as np

    from mmflow.cleaning.duplicates import near_pairs

    hashes = np.load(path)
    began = time.perf_counter()
    pairs = near_pairs(hashes, RADIUS)
    return {"seconds": time.perf_counter() - began, "pairs": len(pairs)}
