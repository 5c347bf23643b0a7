"""How surprised a decoder is by what people wrote: less is better, and one that cannot be computed is infinite."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def perplexity_metrics(losses_N: NDArray[np.floating], tokens_N: NDArray[np.integer]) -> dict[str, float]:
    """{"perplexity", "token_loss", "tokens"} from each text's loss in nats and its number of tokens.

    exp of the mean loss a token over all texts, so that a long text weighs by its length; `token_loss` is that mean.
    Infinite without a token and where a loss is not a number.
    """
    tokens = int(tokens_N.sum())
    mean = float(losses_N.sum()) / tokens if tokens else math.inf
    mean = math.inf if math.isnan(mean) else mean
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "token_loss": mean, "tokens": float(tokens)}
