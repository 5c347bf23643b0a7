"""Which shard a record goes to: evenly, by its key alone, and with every rival for the key known there."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mmflow.ingest.records import RECORDS
from mmflow.shards.exchange import assign, count_splits, deal, shards_of_splits
from mmflow.shards.write import mark_repeated


def records(keys: list[str], splits: list[str]) -> pa.Table:
    rows = [
        {"place": place, "source": f"r:{place}", "key": key, "split": split, "image": "i", "captions": [], "root": "."}
        for place, (key, split) in enumerate(zip(keys, splits, strict=True))
    ]
    return pa.Table.from_pylist(rows, RECORDS)


def test_shards_are_counted_over_sorted_splits() -> None:
    assert shards_of_splits({"train": 101, "a": 1, "b": 100}, 50) == {
        "a": range(1),
        "b": range(1, 3),
        "train": range(3, 6),
    }


def test_shards_are_even_and_shuffled() -> None:
    keys = [f"{number:06d}" for number in range(20_000)]
    assigned = assign(records(keys, ["train"] * len(keys)), {"train": range(20)}, seed=5)
    sizes = np.bincount(assigned["shard"].to_numpy(), minlength=20)
    assert sizes.min() > 850
    assert sizes.max() < 1150
    neighbours = np.diff(assigned["shard"].to_numpy())
    assert (neighbours == 0).mean() < 0.08  # a twentieth by chance: nothing of the source's order is left
    other = assign(records(keys, ["train"] * len(keys)), {"train": range(20)}, seed=6)
    assert (other["shard"].to_numpy() != assigned["shard"].to_numpy()).mean() > 0.9


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["train", "test", "dev"])), min_size=1))
def test_one_record_of_a_key_survives_over_all_splits(drawn: list[tuple[str, str]]) -> None:
    table = records([key for key, _ in drawn], [split for _, split in drawn])
    shards = shards_of_splits({str(split): number for split, number in count_splits(table).items()}, 2)
    num_shards = max(numbers.stop for numbers in shards.values())
    parts = deal(table, shards, 0, 2) if num_shards > 1 else (deal(table, shards, 0, 1),)
    assert not isinstance(parts, pa.Table)
    rows = sorted(pa.concat_tables(parts).to_pylist(), key=lambda row: (row["shard"], row["hash"], row["place"]))
    kept = [
        row for number in range(num_shards) for row in mark_repeated([row for row in rows if row["shard"] == number])
    ]
    assert sorted(row["place"] for row in kept) == list(range(len(drawn)))
    survivors = {row["key"]: row["place"] for row in kept if row["reason"] is None}
    assert survivors == {key: min(i for i, (k, _) in enumerate(drawn) if k == key) for key, _ in drawn}
    assert sum(row["reason"] == "key_repeated" for row in kept) == len(drawn) - len(survivors)
    for row in kept:
        assert row["shard"] in shards[row["split"]]
