"""A row's shard depends on its key alone, shards are even, and every row goes to one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.cleaning.prepare import PIECE
from mmflow.dataset.write import (
    OTHER_BYTES,
    Extent,
    assign,
    deal,
    extents_of_splits,
    shards_of_splits,
    with_verdicts,
)


def rows_of(keys: list[str], splits: list[str | None]) -> pa.Table:
    """A row for each key; rows without a split are rejected."""
    rows = [
        {
            "place": place,
            "source": f"r:{place}",
            "key": key,
            "split": split,
            "image_bytes": 100,
            "frames": [],
            **({} if split else {"reason": "image_missing", "detail": "gone"}),
        }
        for place, (key, split) in enumerate(zip(keys, splits, strict=True))
    ]
    return pa.Table.from_pylist(rows, PIECE)


def test_shards_are_counted_over_sorted_splits_by_samples_or_bytes() -> None:
    extents = {"train": Extent(101, 0), "a": Extent(1, 0), "b": Extent(100, 7000)}
    assert shards_of_splits(extents, 50, 10**9) == {"a": range(1), "b": range(1, 3), "train": range(3, 6)}
    assert shards_of_splits(extents, 50, 1000)["b"] == range(1, 8)
    assert shards_of_splits({"b": Extent(100, 7000)}, 50, 10**9, first=42) == {"b": range(42, 44)}


def test_shards_are_even_and_shuffled() -> None:
    keys = [f"{number:06d}" for number in range(20_000)]
    assigned = assign(rows_of(keys, ["train"] * len(keys)), {"train": range(20)}, seed=5)
    sizes = np.bincount(assigned["shard"].to_numpy(), minlength=20)
    assert sizes.min() > 850
    assert sizes.max() < 1150
    neighbours = np.diff(assigned["shard"].to_numpy())
    assert (neighbours == 0).mean() < 0.08  # 0.05 by chance: the order of the source is gone
    other = assign(rows_of(keys, ["train"] * len(keys)), {"train": range(20)}, seed=6)
    assert (other["shard"].to_numpy() != assigned["shard"].to_numpy()).mean() > 0.9


@given(
    st.lists(st.tuples(st.text("abcdef", min_size=1), st.sampled_from(["train", "test", None])), min_size=1),
    st.integers(1, 4),
    st.sampled_from([0, 17]),
)
def test_every_row_goes_to_one_shard_of_its_split(
    keys_and_splits: list[tuple[str, str | None]], num_buckets: int, first: int
) -> None:
    table = rows_of([key for key, _ in keys_and_splits], [split for _, split in keys_and_splits])
    shards = shards_of_splits(extents_of_splits(table), 2, 1 << 30, first) or {"train": range(first, first + 1)}
    num_buckets = min(num_buckets, max(numbers.stop for numbers in shards.values()) - first)
    buckets = [part.to_pylist() for part in deal(table, shards, 0, num_buckets)]
    rows = [row for bucket in buckets for row in bucket]
    assert sorted(row["place"] for row in rows) == list(range(len(keys_and_splits)))
    for row in rows:
        everywhere = range(first, max(numbers.stop for numbers in shards.values()))
        assert row["shard"] in (everywhere if row["reason"] else shards[row["split"]])
    numbers = [shard for bucket in buckets for shard in sorted({row["shard"] for row in bucket})]
    assert numbers == sorted({row["shard"] for row in rows}), "a shard's rows are in one bucket"


def test_rejections_are_applied_to_their_rows_only() -> None:
    rows = rows_of(["a", "b", "c", "d"], ["train", None, "train", "train"])
    rejected = pa.table(
        {
            "place": pa.array([2, 9], pa.int64()),
            "reason": ["key_repeated", "key_repeated"],
            "detail": ["an earlier record has this key", "of another group"],
        }
    )
    with_reasons = with_verdicts(rows, rejected).to_pylist()
    assert [row["reason"] for row in with_reasons] == [None, "image_missing", "key_repeated", None]
    assert [row["detail"] for row in with_reasons] == [None, "gone", "an earlier record has this key", None]
    assert with_verdicts(rows, rejected.slice(0, 0)).equals(rows)


def test_extents_include_frames_and_exclude_rejected_rows() -> None:
    rows = rows_of(["a", "b", "c"], ["train", None, "dev"]).to_pylist()
    rows[2]["frames"] = [{"offset": 0, "bytes": 1000}, {"offset": 1000, "bytes": 24}]
    extents = extents_of_splits(pa.Table.from_pylist(rows, PIECE))
    assert extents == {
        "train": Extent(1, 100 + OTHER_BYTES),
        "dev": Extent(1, 100 + OTHER_BYTES + 1024 + 2 * 512),
    }


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_shard_of_a_row_depends_only_on_its_key(seed: int) -> None:
    keys = [f"k{number}" for number in range(200)]
    together = assign(rows_of(keys, ["train"] * 200), {"train": range(7)}, seed)
    alone = assign(rows_of(keys[50:60], ["train"] * 10), {"train": range(7)}, seed)
    assert alone["shard"].to_pylist() == together["shard"].to_pylist()[50:60]
