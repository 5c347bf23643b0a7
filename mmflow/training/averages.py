"""A running average of the weights: often better than the last ones, and less at the mercy of the last batches.

It is one more state of the optimizer, in fp32 beside the master that it follows: sharded where masters are, offloaded
where states are, saved with them, and left as it is by a step that DeepSpeed leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def whole_average(engine: Any, parameter: Tensor) -> Tensor | None:
    """A parameter's average in full, at any ZeRO stage; None for one that was never stepped. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if not parameter.requires_grad:
        return None
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state.get(parameter, {}).get(AVERAGE)  # type: ignore[no-any-return]
    average: Tensor = safe_get_full_optimizer_state(parameter, AVERAGE)
    return average
