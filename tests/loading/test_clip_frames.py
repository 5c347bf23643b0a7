"""Frames of a clip: one of each equal span of time, the middle in evaluation, any in training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.loading.transforms import choose_frames


@given(total=st.integers(1, 400), count=st.integers(1, 40), seed=st.none() | st.integers(0, 2**32))
def test_frames_ascend_and_come_one_from_each_span(total: int, count: int, seed: int | None) -> None:
    frames = choose_frames(total, count, None if seed is None else np.random.default_rng(seed))
    assert len(frames) == min(total, count)
    for number, frame in enumerate(frames):
        assert number * total // len(frames) <= frame < (number + 1) * total // len(frames)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(16, 4, [2, 6, 10, 14]), (10, 4, [1, 3, 6, 8]), (3, 8, [0, 1, 2]), (9, 1, [4]), (1, 4, [0])],
)
def test_evaluation_takes_the_middles(total: int, count: int, expected: list[int]) -> None:
    assert choose_frames(total, count) == expected


def test_training_comes_to_every_frame() -> None:
    random = np.random.default_rng(0)
    assert {frame for _ in range(300) for frame in choose_frames(20, 4, random)} == set(range(20))


def test_a_short_clip_draws_as_much_as_a_long_one() -> None:
    after = []
    for total in (2, 100):
        random = np.random.default_rng(0)
        choose_frames(total, 8, random)
        after.append(random.random())
    assert after[0] == after[1]
