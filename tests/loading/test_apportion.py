"""What each dataset of a mixture gives: whole numbers within one of what its weights ask, at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmflow.core.errors import RecipeError
from mmflow.loading.config import CurriculumConfig, MixedDatasetConfig, MixtureConfig
from mmflow.loading.mixture import WHOLE, apportion, shares_of, timeline, to_shares


@st.composite
def weights_by_step(draw: st.DrawFn) -> list[tuple[int, list[float]]]:
    """Up to four changes of the weights of up to seven datasets, some of them weighing nothing, or next to nothing."""
    num_datasets = draw(st.integers(1, 7))
    weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e-3), st.floats(0.01, 1), st.integers(1, 9).map(float))
    weights = st.lists(weight, min_size=num_datasets, max_size=num_datasets).filter(any)
    steps = [0, *sorted(draw(st.sets(st.integers(1, 60), max_size=4)))]
    return [(step, draw(weights)) for step in steps]


def given_until(changes: Sequence[tuple[int, Sequence[float]]], batch: int, steps: int) -> list[tuple[int, ...]]:
    """What each dataset has given before each step."""
    segments = timeline({step: to_shares(weights) for step, weights in changes}, batch)
    found = [(0,) * len(changes[0][1])]
    for step in range(1, steps + 1):
        found.append(apportion(segments, found[-1], step * batch))
    return found


def mixture(**settings: object) -> MixtureConfig:
    return MixtureConfig.model_validate({"datasets": [{"uri": "one"}, {"uri": "two"}], **settings})


@given(changes=weights_by_step(), batch=st.integers(1, 40))
def test_every_dataset_stays_within_one_sample_of_its_weights_at_every_step(
    changes: list[tuple[int, list[float]]], batch: int
) -> None:
    asked = [0.0] * len(changes[0][1])
    found = given_until(changes, batch, 80)
    for step, (before, after) in enumerate(pairwise(found)):
        weights = next(weights for first, weights in reversed(changes) if first <= step)
        asked = [owed + batch * weight / sum(weights) for owed, weight in zip(asked, weights, strict=True)]
        assert sum(after) - sum(before) == batch
        assert all(last <= now for last, now in zip(before, after, strict=True))
        assert all(abs(now - owed) < 1 for now, owed in zip(after, asked, strict=True)), (after, asked)
        # What never weighed anything is never drawn; what weighs nothing any more may still owe a sample.
        assert not any(now for now, owed in zip(after, asked, strict=True) if not owed)


def test_one_sample_a_batch_goes_round_the_datasets() -> None:
    """A dataset that always came last would starve those who wait for a whole batch."""
    found = given_until([(0, [1.0, 1.0, 2.0])], 1, 8)
    chosen = [[now - last for last, now in zip(*pair, strict=True)].index(1) for pair in pairwise(found)]
    assert sorted(chosen[:4]) == sorted(chosen[4:]) == [0, 1, 2, 2]


def test_the_same_is_given_a_trillion_samples_on() -> None:
    segments = timeline({0: to_shares([1.0, 2.0, 5.0])}, 8)
    far = 10**12
    drawn = (far // 8, 2 * far // 8, 5 * far // 8)
    after = apportion(segments, drawn, far + 8)
    assert [now - last for last, now in zip(drawn, after, strict=True)] == [1, 2, 5]


def test_weights_change_at_once_at_the_step_that_the_curriculum_names() -> None:
    changes = shares_of(
        mixture(curriculum=[{"step": 3, "weights": [0, 1, 3]}, {"step": 5, "weights": [1, 0, 0]}]), [5, 5, 10]
    )
    segments = timeline(changes, 8)
    found = [(0, 0, 0)]
    for step in range(1, 8):
        found.append(apportion(segments, found[-1], 8 * step))
    steps = [tuple(now - last for last, now in zip(*pair, strict=True)) for pair in pairwise(found)]
    assert steps == [(2, 2, 4)] * 3 + [(0, 2, 6)] * 2 + [(8, 0, 0)] * 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.01, 0.09, 0.9]),
        ({"weighting": "temperature", "temperature": 2}, [0.074146, 0.222439, 0.703415]),
        ({"weighting": "temperature", "temperature": 1e6}, [1 / 3] * 3),
        ({"weighting": "temperature", "temperature": 0.001}, [0, 0, 1]),
        ({"weighting": "fixed", "weights": [6, 3, 1]}, [0.6, 0.3, 0.1]),
    ],
)
def test_weights_follow_the_samples_their_temperature_or_the_recipe(
    settings: dict[str, object], expected: list[float]
) -> None:
    shares = shares_of(mixture(**settings), [100, 900, 9_000])[0]
    assert sum(shares) == WHOLE
    assert [share / WHOLE for share in shares] == pytest.approx(expected, abs=1e-5)


def test_a_curriculum_from_the_first_step_on_replaces_the_weights() -> None:
    changes = shares_of(mixture(curriculum=[{"step": 0, "weights": [1, 1, 2]}]), [5, 5, 5])
    assert changes == {0: (WHOLE // 4, WHOLE // 4, WHOLE // 2)}


@given(weights=st.lists(st.floats(0, 1e9), min_size=1, max_size=9).filter(lambda each: sum(each) > 1e-3))
def test_shares_are_whole_sum_to_all_and_lose_less_than_one(weights: list[float]) -> None:
    shares = to_shares(weights)
    assert sum(shares) == WHOLE
    total = math.fsum(weights)
    assert all(abs(share - weight / total * WHOLE) < 1 for share, weight in zip(shares, weights, strict=True))


def test_weight_on_a_dataset_without_samples_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^loader\.mixture: dataset 1 .* has weight 2 from step 7 on, .* no samples"):
        shares_of(mixture(curriculum=[{"step": 7, "weights": [1, 2, 1]}]), [5, 0, 5])
    with pytest.raises(RecipeError, match=r"^loader\.mixture: no dataset has samples"):
        shares_of(mixture(), [0, 0, 0])


def test_what_another_mixture_drew_is_refused() -> None:
    segments = timeline({0: to_shares([1.0, 1.0])}, 8)
    with pytest.raises(RecipeError, match=r"drew \[30, 10\], but these weights give \[24, 24\]"):
        apportion(segments, (30, 10), 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "fixed"}, "weights go with weighting: fixed"),
        ({"weights": [1, 1, 1]}, "weights go with weighting: fixed, but it is proportional"),
        ({"temperature": 2}, "temperature goes with weighting: temperature, but it is proportional"),
        ({"weighting": "fixed", "weights": [1, 1]}, "got 2 for 3 datasets"),
        ({"weighting": "fixed", "weights": [1, -1, 1]}, "at least 0 and one must be above 0"),
        ({"weighting": "fixed", "weights": [0, 0, 0]}, "at least 0 and one must be above 0"),
        ({"weighting": "fixed", "weights": [1, 1, math.nan]}, "at least 0 and one must be above 0"),
        ({"weighting": "fixed", "weights": [1, 1, math.inf]}, "at least 0 and one must be above 0"),
        ({"curriculum": [{"step": 4, "weights": [1, 1]}]}, "got 2 for 3 datasets"),
        (
            {"curriculum": [{"step": 4, "weights": [1, 1, 1]}, {"step": 4, "weights": [1, 1, 2]}]},
            r"increase, got \[4, 4\]",
        ),
        (
            {"curriculum": [{"step": 9, "weights": [1, 1, 1]}, {"step": 4, "weights": [1, 1, 2]}]},
            r"increase, got \[9, 4\]",
        ),
        ({"datasets": []}, "at least 1 item"),
    ],
)
def test_weights_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        mixture(**settings)


def test_a_mixture_is_plain_settings() -> None:
    found = mixture(weighting="fixed", weights=[1, 2, 3], curriculum=[{"step": 4, "weights": [3, 2, 1]}])
    assert found.datasets[0] == MixedDatasetConfig(uri="one")
    assert found.curriculum == [CurriculumConfig(step=4, weights=[3, 2, 1])]
