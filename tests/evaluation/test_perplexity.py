"""Perplexity by hand; what cannot be computed is infinite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmflow.evaluation.perplexity import perplexity_metrics


def test_a_text_weighs_by_its_tokens() -> None:
    found = perplexity_metrics(np.array([2.0, 1.0]), np.array([1, 4]))
    assert found == {"perplexity": pytest.approx(math.exp(3 / 5)), "token_loss": pytest.approx(3 / 5), "tokens": 5.0}


def test_odds_as_even_as_a_die_are_a_perplexity_of_six() -> None:
    assert perplexity_metrics(np.full(3, 7 * math.log(6)), np.full(3, 7))["perplexity"] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("losses", "tokens"), [([math.nan, 1.0], [2, 2]), ([math.inf, 1.0], [2, 2]), ([1e9], [1]), ([], []), ([0.0], [0])]
)
def test_what_is_no_number_too_large_or_nothing_is_infinite(losses: list[float], tokens: list[int]) -> None:
    assert perplexity_metrics(np.array(losses), np.array(tokens, dtype=np.int64))["perplexity"] == math.inf
