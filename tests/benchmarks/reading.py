"""Reading samples from tars, with hashes checked and nothing decoded, compared with webdataset and Ray Data."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.measure import CORES
from tests.benchmarks.table import Row, faster
from tests.benchmarks.tars import count_of, rates, seconds_of, sharded_jpegs

CONTESTANTS = ("pass_ours", "shuffled_ours", "read_webdataset", "read_ray")
WINDOW, BATCH = 4096, 256
PEERS = ()
VERSIONS = ("webdataset", "ray", "pyarrow", "xxhash", "numpy")


def run() -> list[Row]:
    """All over the same dataset. A pass gives bytes, as the peers do; the shuffled epoch parses, as training does."""
    dataset, count = sharded_jpegs()
    found = rates({name: f"tests.benchmarks.reading:{name}" for name in CONTESTANTS}, dataset, count)
    ray_note = "Ray's start and first pass not counted"
    webdataset = ("webdataset", found["read_webdataset"])
    return [
        faster("a pass in the order of the tars", found["pass_ours"], *webdataset, goal=10),
        faster("a pass in the order of the tars", found["pass_ours"], "ray.data.read_webdataset", found["read_ray"],
               goal=10, note=ray_note),
        faster("an epoch in its shuffled order, captions and metadata parsed", found["shuffled_ours"], *webdataset,
               note="as training reads; webdataset gives bytes in the order of the tars"),
    ]  # fmt: skip


# --- contestants, each called in a process of its own: seconds for the dataset at `uri` -------------------------------


def pass_ours(uri: str) -> float:
    """Every sample of the dataset, as bytes, each body checked against its hash."""
    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader

    dataset = open_dataset(uri)

    def work() -> int:
        readers = [Reader(dataset, split) for split in dataset.splits]
        return sum(
            1
            for reader in readers
            for shard, info in enumerate(reader.shards)
            for _ in reader.scan(shard, 0, info.samples)
        )

    return seconds_of(work, count_of(uri))


def shuffled_ours(uri: str) -> float:
    """The same in the order of an epoch: batches of the plan, each sample read by its shard and row."""
    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader
    from mmflow.loading.plan import LoaderState, Order

    dataset = open_dataset(uri)

    def work() -> int:
        seen = 0
        for split in dataset.splits:
            reader = Reader(dataset, split)
            order = Order(tuple(shard.samples for shard in reader.shards), BATCH, seed=0, window=WINDOW, lanes=16)
            state = LoaderState()
            while state.epoch == 0:
                slots = order.batch(state)
                for shard, row, real in zip(slots.shard.tolist(), slots.row.tolist(), slots.real.tolist(), strict=True):
                    if real:
                        reader.read(shard, row)
                        seen += 1
                state = order.after(state)
        return seen

    return seconds_of(work, count_of(uri))


def read_webdataset(uri: str) -> float:
    """Every sample of the tars, as bytes."""
    import webdataset

    tars = _tars(uri)
    return seconds_of(
        lambda: sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)), count_of(uri)
    )


def read_ray(uri: str) -> float:
    """Every sample of the tars, as bytes, on a running Ray."""
    import ray

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="ERROR")
    tars = _tars(uri)
    seconds = seconds_of(
        lambda: sum(1 for _ in ray.data.read_webdataset(tars, decoder=False).iter_rows()), count_of(uri)
    )
    ray.shutdown()
    return seconds


def _tars(uri: str) -> list[str]:
    return [str(path) for path in sorted((Path(uri) / "shards").glob("*.tar"))]
