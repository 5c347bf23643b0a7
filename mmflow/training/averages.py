"""A running average of the weights: often better than the last ones, and less at the mercy of the last batches.

It is one more state of the optimizer, in fp32 beside the master that it follows: sharded where masters are, offloaded
where states are, saved with them, and left as it is by a step that DeepSpeed leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmflow.training.fragments import Fragment

AVERAGE = "average"
STEPS = "average_steps"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Have every step move the averages by 1 − decay of the way to the weights, further in the first steps."""

    @torch.no_grad()
    def follow(optimizer: torch.optim.Optimizer, arguments: Any, named: Any) -> None:
        for group in optimizer.param_groups:
            for weights in group["params"]:
                state = optimizer.state[weights]
                if not state:  # no gradient has come to it yet
                    continue
                if AVERAGE not in state:
                    state |= {AVERAGE: weights.detach().clone(), STEPS: torch.tensor(0.0)}
                steps = float(state[STEPS])
                state[AVERAGE].lerp_(weights, 1 - min(decay, (1 + steps) / (10 + steps)))
                state[STEPS] += 1

    optimizer.register_step_post_hook(follow)


def whole_average(engine: Any, parameter: Tensor, places: Mapping[Tensor, tuple[Tensor, Fragment]]) -> Tensor | None:
    """A parameter's average in full; None for one that is not trained. `places` as `places_of` has them. Collective.

    Not by DeepSpeed's `safe_get_full_optimizer_state`, which below ZeRO 3 knows the states of the first parameter group
    alone.
    """
    if parameter not in places:
        average: Tensor | None = engine.basic_optimizer.state.get(parameter, {}).get(AVERAGE)
        return average
    flat, fragment = places[parameter]
    # Before the first step that was not left out, the average is the weights.
    return fragment.whole(engine.basic_optimizer.state[flat].get(AVERAGE, flat), engine.device)
