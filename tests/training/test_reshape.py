"""The hash by which what was loaded is compared with what was saved. Loading itself is tested by `test_faults`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmflow.training import zero
from mmflow.training.zero import element_hash


@given(cuts=st.lists(st.integers(0, 100), max_size=6), seed=st.integers(0, 1000))
def test_parts_of_a_tensor_hash_to_the_whole(cuts: list[int], seed: int) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    edges = [0, *sorted(cuts), 100]
    parts = [element_hash("a", values[start:stop], start) for start, stop in pairwise(edges)]
    assert torch.stack(parts).sum() == element_hash("a", values, 0)


def test_a_large_tensor_is_hashed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    whole = element_hash("a", values, 3)
    monkeypatch.setattr(zero, "CHUNK", 64)
    assert element_hash("a", values, 3) == whole


def test_values_places_and_names_count() -> None:
    values = torch.randn(100)
    swapped, nudged = values.clone(), values.clone()
    swapped[[3, 4]] = values[[4, 3]]
    nudged[7] = torch.nextafter(values[7], torch.tensor(9.0))
    hashes = [
        element_hash("a", values, 0),
        element_hash("a", swapped, 0),
        element_hash("a", nudged, 0),
        element_hash("a", values, 1),
        element_hash("b", values, 0),
    ]
    assert len({int(each) for each in hashes}) == len(hashes)
