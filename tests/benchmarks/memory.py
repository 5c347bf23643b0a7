"""Peak memory of a build's processes, over all of openclipart with its 80-megapixel drawings."""

from __future__ import annotations

from tests.benchmarks import data
from tests.benchmarks.build import shard
from tests.benchmarks.measure import SHARE
from tests.benchmarks.table import Row, bounded

MOST_GIB = 1.5
PEERS = ()
VERSIONS = ("ray", "pyarrow", "pillow")


def run() -> list[Row]:
    """One build, watched from outside: the high-water marks that the system keeps of each process."""
    corpus = data.openclipart()
    records = data.share_of(corpus, round(SHARE * sum(1 for _ in data.read(corpus))))
    finished, _ = shard(records, [], watch=True)
    workers = [peak / 2**30 for worker, peak in finished.peaks.values() if worker]
    others = [peak / 2**30 for worker, peak in finished.peaks.values() if not worker]
    count = sum(1 for _ in data.read(records))
    note = f"of {len(workers)} workers over {count:,} records; pages of the object store that it touched are counted"
    return [
        bounded("peak of the largest worker", [max(workers)], unit="GiB", most=MOST_GIB, note=note),
        Row(name="peak of the largest other process", ours=max(others), unit="GiB", note="the driver or Ray's own"),
    ]
