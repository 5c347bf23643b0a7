"""Repeated keys are found wherever they are, in however many passes, and nothing else is."""

from __future__ import annotations

from itertools import count

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.dataset import verify as module
from mmflow.dataset.verify import Repeat, repeated_keys

SHARDS = st.lists(st.lists(st.sampled_from([f"key-{number}" for number in range(30)]), max_size=12), max_size=6)


def plain(shards: list[list[str]]) -> set[Repeat]:
    first: dict[str, tuple[int, int]] = {}
    found = set()
    for shard, keys in enumerate(shards):
        for row, key in enumerate(keys):
            if key in first:
                found.add(Repeat(shard, row, key, *first[key]))
            first.setdefault(key, (shard, row))
    return found


@given(SHARDS, st.integers(1, 100))
def test_repeats_are_those_a_dict_would_find(shards: list[list[str]], per_pass: int) -> None:
    found = list(
        repeated_keys(
            lambda shard: pa.array(shards[shard], pa.string()), [len(each) for each in shards], per_pass=per_pass
        )
    )
    assert len(found) == len(set(found))
    assert set(found) == plain(shards)


def test_two_keys_of_one_hash_are_not_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash_texts", lambda texts: np.zeros(len(texts), np.uint64))
    shards = [["a", "b"], ["c", "a"]]
    found = list(repeated_keys(lambda shard: pa.array(shards[shard], pa.string()), [2, 2]))
    assert found == [Repeat(1, 1, "a", 0, 0)]


def test_no_pass_holds_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    sound = module.repeated_values

    def measure(parts: object) -> object:
        parts = list(parts)  # type: ignore[call-overload]
        held.append(sum(len(part) for part in parts))
        return sound(parts)

    monkeypatch.setattr(module, "repeated_values", measure)
    number = count()
    shards = [pa.array([f"key-{next(number)}" for _ in range(500)]) for _ in range(8)]
    assert list(repeated_keys(shards.__getitem__, [500] * 8, per_pass=1000)) == []
    assert len(held) == 4
    assert sum(held) == 4000
    assert max(held) < 1150
