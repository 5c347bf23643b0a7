"""The gate promotes what is better and refuses every doubt: worse, missing, NaN, below a floor."""

import math

import pytest
from pydantic import ValidationError

from mmflow.registry.gate import Decision, PromoteConfig, decide

RECALL = "unseen_variants/text_to_image/R@1"


def gate(challenger, champion=None, metric=RECALL, **bounds) -> Decision:
    return decide(PromoteConfig(model="clip", metric=metric, **bounds), challenger, champion)


@pytest.mark.parametrize(
    ("challenger", "champion", "min_gain", "promoted"),
    [
        (0.60, 0.50, 0.00, True),
        (0.50, 0.50, 0.00, True),  # an equal passes at min_gain 0 …
        (0.50, 0.50, 0.01, False),  # … and not when a gain is asked for
        (0.57, 0.55, 0.02, True),  # exactly the gain, though 0.55 + 0.02 > 0.57 in binary
        (0.5699, 0.55, 0.02, False),
        (0.49, 0.50, -0.02, True),
        (0.47, 0.50, -0.02, False),
    ],
)
def test_challenger_needs_its_gain(challenger, champion, min_gain, promoted):
    decision = gate({RECALL: challenger}, {RECALL: champion}, min_gain=min_gain)
    assert decision.promoted is promoted
    assert len(decision.reasons) == 1
    if not promoted:
        assert f"{challenger:.6g} against the champion's {champion:.6g}" in decision.reasons[0]


@pytest.mark.parametrize("name", ["mean_rank", "median_rank", "perplexity", "token_loss", "R@1_drop"])
@pytest.mark.parametrize(("challenger", "promoted"), [(4.0, True), (5.0, True), (5.1, False)])
def test_lower_is_better_for_ranks_losses_and_perplexities(name, challenger, promoted):
    metric = f"s/text_to_image/{name}"
    assert gate({metric: challenger}, {metric: 5.0}, metric).promoted is promoted
    assert gate({metric: challenger}, None, metric, floors={metric: 5.0}).promoted is promoted
    drop = gate({RECALL: 1.0, metric: challenger + 1}, {RECALL: 0.0, metric: 5.0}, max_drop={metric: 1.0})
    assert drop.promoted is promoted


@pytest.mark.parametrize("metrics", [{}, *({RECALL: value} for value in (math.nan, math.inf, -math.inf, None, "0.9"))])
def test_a_value_that_is_no_finite_number_refuses(metrics):
    for champion in (None, {RECALL: 0.1}):
        decision = gate(metrics, champion)
        assert not decision.promoted
        assert RECALL in decision.reasons[0]
    decision = gate({RECALL: 0.9}, metrics)
    assert not decision.promoted
    assert "evaluate the champion again" in decision.reasons[0]


def test_floors_bind_with_and_without_a_champion():
    for champion in (None, {RECALL: 0.1}):
        assert gate({RECALL: 0.3, "b": 0.2}, champion, floors={RECALL: 0.3, "b": 0.2}).promoted
        decision = gate({RECALL: 0.3, "b": 0.19}, champion, floors={RECALL: 0.31, "b": 0.2})
        assert not decision.promoted
        assert len(decision.reasons) == 2
    assert not gate({RECALL: 0.3}, floors={"b": 0.0}).promoted  # a floor under a metric that nobody measured


def test_max_drop_protects_the_other_metrics():
    champion, bound = {RECALL: 0.5, "accuracy": 0.8}, {"accuracy": 0.01}
    assert gate({RECALL: 0.6, "accuracy": 0.79}, champion, max_drop=bound).promoted
    lost = gate({RECALL: 0.6, "accuracy": 0.78}, champion, max_drop=bound)
    assert not lost.promoted
    (failed,) = (check for check in lost.checks if not check.passed)
    assert (failed.name, failed.challenger) == ("accuracy max_drop", 0.78)
    assert failed.threshold == pytest.approx(0.79)
    assert not gate({RECALL: 0.6}, max_drop=bound).promoted
    assert not gate({RECALL: 0.6, "accuracy": 0.8}, {RECALL: 0.5}, max_drop=bound).promoted


@pytest.mark.parametrize(
    "settings",
    [
        {"min_gain": -math.inf},
        {"min_gain": math.nan},
        {"floors": {"a": math.nan}},
        {"max_drop": {"a": math.inf}},
        {"max_drop": {"a": -0.1}},
        {"metric": ""},
        {"model": "it's"},
        {"candidate": "best"},
        {"floor": {}},
    ],
)
def test_settings_that_cannot_refuse_or_mean_nothing_are_errors(settings):
    with pytest.raises(ValidationError):
        PromoteConfig(**{"model": "clip", "metric": RECALL, **settings})
